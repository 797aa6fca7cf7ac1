"""Asks each kind of server for log-probabilities, and reads its answers into one form.

The modules ``openai``, ``llamacpp``, ``vllm`` and ``sglang`` hold the requests and the forms of the answers.
"""

from __future__ import annotations

import dataclasses
import threading

from slimkernels.served_rows import llamacpp, openai, sglang, vllm
from slimkernels.served_rows.answers import Answer, Call, Options, Request
from slimkernels.serving.client import ServerClient, ServerRequestError, UnusableAnswerError

_GENERATION = {
    "completions": openai.completion,
    "chat": openai.chat,
    "llama.cpp": llamacpp.completion,
    "sglang": sglang.generation,
}
_SCORING = {"openai": openai.echo, "llamacpp": openai.echo, "vllm": vllm.scores, "sglang": sglang.scores}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerApi(Options):
    """A server, a model of it, and the options of every request.

    Attributes:
        client: Client of the server.
        api: Interface that generates documents: "completions", "chat", "llama.cpp" or "sglang".
    """

    client: ServerClient
    api: str
    _spells_candidates: threading.Event = dataclasses.field(default_factory=threading.Event, repr=False)

    def generate(self, request: Request) -> Answer:
        """Lets the server continue a prompt.

        Raises:
            ServerRequestError, UnusableAnswerError, ServerUnavailableError: The same as in ``ServerClient.post``, which
                asks again for an answer that cannot be read or has a text without log-probabilities.
        """
        return self.client.post(*_GENERATION[self.api](self, request))

    def score(self, request: Request) -> Answer:
        """Asks for the log-probabilities of the tokens of a document, at least of those that are labels.

        Raises:
            ServerRequestError, UnusableAnswerError, ServerUnavailableError: The same as in ``ServerClient.post``, which
                asks again for an answer that cannot be read or lacks tokens; also for a server that cannot score text.
        """
        call: Call = _SCORING[self.kind](self, request, self.client.url)
        if self.kind != "vllm" or self._spells_candidates.is_set():
            return self.client.post(*call)
        try:
            return self.client.post(*vllm.scores_without_text(self, request, self.client.url))
        except UnusableAnswerError:
            raise
        except ServerRequestError:
            # The server has no such path unless it was started with --enable-scale-out, or refuses the document too.
            answer = self.client.post(*call)
        self._spells_candidates.set()
        return answer
