"""Asks each kind of server for log-probabilities, and reads its answers into one form.

The modules ``openai``, ``llamacpp``, ``vllm`` and ``sglang`` hold the requests and the forms of the answers.
"""

from __future__ import annotations

import dataclasses
import functools

from slimkernels.served_rows import llamacpp, openai, sglang, vllm
from slimkernels.served_rows.answers import Answer, Call, Options, Request
from slimkernels.serving.client import ServerClient
from slimkernels.serving.errors import ServerRequestError, ServerUnavailableError

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
        _answers: Whether the server answers at a path that it may lack, by path; empty until it is known.
    """

    client: ServerClient
    api: str
    _answers: dict[str, bool] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    def generate(self, request: Request) -> Answer:
        """Lets the server continue a prompt.

        Raises:
            ServerRequestError, UnusableAnswerError, ServerUnavailableError, BudgetSpentError: The same as in
                ``ServerClient.post``, which asks again for an answer that cannot be read or has a text without
                log-probabilities.
        """
        call: Call = _GENERATION[self.api](self, request)
        return self.client.post(*call, tokens=len(request.prompt_ids) + self.max_tokens)

    def score(self, request: Request) -> Answer:
        """Asks for the log-probabilities of the tokens of a document, at least of those that are labels.

        Raises:
            ServerRequestError, UnusableAnswerError, ServerUnavailableError, BudgetSpentError: The same as in
                ``ServerClient.post``, which asks again for an answer that cannot be read or lacks tokens; also for a
                server that cannot score text.
        """
        # The server generates one token.
        post = functools.partial(self.client.post, tokens=len(request.prompt_ids) + 1)
        call: Call = _SCORING[self.kind](self, request, self.client.url)
        if self.kind != "vllm" or request.spelled:
            return post(*call)
        tried = vllm.scores_without_text(self, request, self.client.url)
        known = self._answers.get(tried.path)
        if known is False:
            return post(*call)
        try:
            answer = post(*tried)
        except (ServerRequestError, ServerUnavailableError):
            if known:
                raise
            # The server has no such path, which a proxy may say in any way, or does not take the document either.
            answer = post(*call)
            known = False
        self._answers[tried.path] = known is None or known
        return answer
