"""The demonstration's phases: half of a real teacher's layers, healed three ways by what the whole teacher says."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
import os
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from slimkernels import __version__
from slimkernels._C import supported_cpu_isas
from slimkernels.demo.phases import Phase, progress_bar, quiet_libraries, say
from slimkernels.demo.report import report
from slimkernels.demo.settings import QUICK, STUDENTS, DemoSettings
from slimkernels.demo.speed import Speed, measure_speed
from slimkernels.demo.training import continued, measure, train_and_measure
from slimkernels.models.make_student import drop_layers
from slimkernels.store import Store, info
from slimkernels.teacher import (
    EMBEDDED_TEACHERS,
    capture,
    generate_documents,
    load_model,
    load_teacher,
    shipped_prompts,
)

SPLITS = ("train", "heldout")
# KD is trained last: the factor of its divergence is the mean of SLIM's weights.
TRAINED = ("sft", "slim", "kd")
# Fields of the recipe that have a flag of `slimkernels train`.
_RECIPE_FLAGS = {
    "--epochs": "num_train_epochs",
    "--batch-size": "per_device_train_batch_size",
    "--learning-rate": "learning_rate",
    "--seed": "seed",
}


def run_demo(
    output_dir: str | os.PathLike[str],
    *,
    quick: bool = False,
    seed: int | None = None,
    tokens: int | None = None,
    settings: DemoSettings | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Runs the phases of the demonstration that are not finished, and prints, plots and returns its numbers.

    The teacher continues short prompts. Some prompts are held out, with all their documents, before anything is
    captured. The teacher's largest logits of both parts are written into two stores. A student of half of the teacher's
    layers, which no longer predicts anything, learns from the same documents in the same order and by the same recipe
    three times: from the labels alone (sft), with the teacher's kept logits (kd), and with those weighted per token
    (slim). The divergence has the same weight in the last two: kd's factor is the mean of slim's weights in its
    training.

    ``output_dir`` then holds ``speed``, ``text``, ``store/train``, ``store/heldout``, ``students/METHOD``,
    ``results.json`` and ``learning_curves.png``. A finished phase is reused if its settings are the same and run again
    if they differ. A phase that was stopped is continued (text, store) or started again (a student).

    Args:
        output_dir: Folder for all results; created if absent.
        quick: Whether to use much smaller sizes, whose numbers only show that everything works.
        seed: Random seed, in place of that of the settings.
        tokens: Number of tokens that the teacher writes, in place of that of the settings.
        settings: Sizes and options; None is the default ones.
        console: Console to print to; None is standard output.

    Returns:
        The content of ``results.json``.

    Raises:
        ValueError: ``quick`` and ``settings`` are both given, or ``output_dir`` holds a folder that is not the
            demonstration's.
        ModelNotFoundError: The teacher is not installed; the message holds the command that installs it.
    """
    if quick and settings is not None:
        raise ValueError("give quick or settings, got both")
    settings = settings or (QUICK if quick else DemoSettings())
    given = {"seed": seed, "tokens": tokens}
    settings = dataclasses.replace(settings, **{name: value for name, value in given.items() if value is not None})
    if settings.teacher_dtype == "auto":
        has_bfloat16 = "avx512_bf16" in supported_cpu_isas()
        settings = dataclasses.replace(settings, teacher_dtype="bfloat16" if has_bfloat16 else "float32")
    console = console or Console()
    start = time.perf_counter()
    say(
        console,
        f"{settings.teacher} loses all but {len(settings.layers)} of its layers, and learns back from its own top "
        f"{settings.top_fraction:.0%} of logits",
    )
    with quiet_libraries():
        demo = _Demo(Path(output_dir), settings, console)
        demo.choose_tokens()
        demo.write_text()
        demo.capture_stores()
        before = demo.measure_start()
        trained = {method: demo.train_student(method) for method in TRAINED}
    results = {
        "version": __version__,
        "settings": demo.as_json(dataclasses.asdict(demo.settings)),
        "speed": demo.speed,
        "store": info(demo.stores / "train"),
        "heldout": info(demo.stores / "heldout"),
        "before": before,
        "students": {method: trained[method] for method in STUDENTS},
        "prompt": demo.shown_prompt,
        "teacher_text": demo.teacher_text,
        "phase_seconds": demo.seconds,
    }
    report(results, demo.output_dir, console)
    say(
        console,
        f"curves in {demo.output_dir / 'learning_curves.png'}, all numbers in {demo.output_dir / 'results.json'}",
    )
    say(console, f"finished in {time.perf_counter() - start:.0f} s; next, heal the same layers with another loss:")
    say(console, f"  {demo.next_command()}")
    return results


class _Demo:
    """The phases of one run, in the order in which they are called.

    Attributes:
        seconds: Wall time of each phase, by its name.
        speed: Tokens per second of the measurement, empty where the settings say the number of tokens.
        shown_prompt: The held-out prompt that every model continues.
        teacher_text: The teacher's continuation of it.
    """

    def __init__(self, output_dir: Path, settings: DemoSettings, console: Console) -> None:
        self.output_dir, self.settings, self.console = output_dir, settings, console
        self.text, self.stores = output_dir / "text", output_dir / "store"
        self.seconds: dict[str, float] = {}
        self.speed: dict[str, float] = {}
        self.prompts = shipped_prompts()[: settings.prompts]
        self.heldout_prompts = set(self.prompts[:: settings.heldout_every])
        self.shown_prompt, self.teacher_text = self.prompts[0], ""
        self._teacher: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None
        self._mean_weight = 1.0

    def choose_tokens(self) -> None:
        """Measures how many tokens there is time for, unless the settings say their number."""
        settings = self.settings
        if settings.tokens is not None:
            return
        key = self._key("teacher", "teacher_dtype", "layers", "heldout_every", "max_new_tokens", "top_fraction")
        key |= self._pick("seconds", "epochs", "batch_size", "evaluations")
        with self._phase("speed", self.output_dir / "speed", key) as phase:
            if not phase.is_done:
                model, tokenizer = self._load_teacher()
                say(self.console, "speed: measuring for about ten seconds how many tokens there is time for")
                speed = measure_speed(
                    model,
                    tokenizer,
                    copy.deepcopy(self.start),
                    self.prompts,
                    document_tokens=settings.max_new_tokens + 8,
                    top_fraction=settings.top_fraction,
                    recipe=self._recipe(),
                )
                heldout = 1 / settings.heldout_every
                tokens = speed.tokens_in(
                    settings.seconds,
                    trained=len(STUDENTS) * settings.epochs * (1 - heldout),
                    measured=len(STUDENTS) * (1 + settings.evaluations) * heldout,
                )
                phase.finish({"tokens": tokens} | speed._asdict())
        self.settings = dataclasses.replace(settings, tokens=phase.result["tokens"])
        self.speed = {name: phase.result[name] for name in Speed._fields}
        say(
            self.console,
            f"speed: the teacher writes {self.speed['writes']:,.0f} tokens/s and scores {self.speed['scores']:,.0f}, a "
            f"student learns from {self.speed['trains']:,.0f}: time for {self.settings.tokens:,} tokens",
        )

    def write_text(self) -> None:
        """Lets the teacher continue the prompts; each document is one line of ``text/documents.jsonl``."""
        settings = self.settings
        with self._phase("text", self.text, self._text_key) as phase:
            if not phase.is_done:
                model, tokenizer = self._load_teacher()
                tokenizer.save_pretrained(self.text / "tokenizer")
                say(
                    self.console,
                    f"text: the teacher writes {settings.tokens:,} tokens, in documents of up to "
                    f"{settings.max_new_tokens} from {len(self.prompts)} prompts",
                )
                with progress_bar(self.console, "tokens") as update:
                    corpus = generate_documents(
                        model,
                        tokenizer,
                        self.prompts,
                        self.text / "documents.jsonl",
                        num_tokens=settings.tokens,
                        max_new_tokens=settings.max_new_tokens,
                        temperature=settings.sampling_temperature,
                        top_k=settings.sampling_top_k,
                        seed=settings.seed,
                        batch_size=64,
                        progress=update,
                    )
                shown = continued(model, tokenizer, self.shown_prompt, settings)
                phase.finish({"documents": corpus.documents, "tokens": corpus.tokens, "shown": shown})
        self.teacher_text = phase.result["shown"]

    def capture_stores(self) -> None:
        """Writes the teacher's largest logits of every label into a store for training and one that is held out."""
        with self._phase("store", self.stores, self._store_key) as phase:
            if phase.is_done:
                return
            model, tokenizer = self._load_teacher()
            lines = [json.loads(line) for line in (self.text / "documents.jsonl").read_text().splitlines()]
            for split in SPLITS:
                is_heldout = split == "heldout"
                documents = [
                    line["input_ids"] for line in lines if (line["prompt"] in self.heldout_prompts) == is_heldout
                ]
                total = sum(map(len, documents))
                kept = f"{self.settings.top_fraction:.0%}"
                say(self.console, f"store: the top {kept} of the teacher's logits of {total:,} tokens, {split}")
                with progress_bar(self.console, "tokens") as update:
                    capture(
                        model,
                        tokenizer,
                        documents,
                        self.stores / split,
                        top_fraction=self.settings.top_fraction,
                        progress=lambda _, done, update=update, total=total: update(done, total),
                    )
            phase.finish({})
        # The teacher's weights take hundreds of megabytes, and training does not need them.
        self._teacher = None

    def measure_start(self) -> dict[str, Any]:
        """Returns the held-out metrics and the text of the student before it learns anything."""
        key = self._store_key | self._pick("layers", "shown_tokens")
        with self._phase("before", self.output_dir / "students" / "before", key) as phase:
            if not phase.is_done:
                metrics = measure(self.start, Store(self.stores / "heldout"), self._is_bfloat16)
                kept, parameters = len(self.settings.layers), self.start.num_parameters()
                say(
                    self.console,
                    f"before: the teacher's {kept} kept layers, {parameters:,} parameters, have held-out perplexity "
                    f"{metrics['perplexity']:,.0f}; the whole teacher {metrics['teacher_perplexity']:.1f}",
                )
                phase.finish(metrics | {"parameters": parameters, "shown": self._continued(self.start)})
        return phase.result

    def train_student(self, method: str) -> dict[str, Any]:
        """Returns one method's held-out curve, speed and text, from a training now or one that was finished before."""
        key = self._store_key | {"method": method, "kd_weight": self._kd_weight(method)}
        key |= self._pick("layers", "epochs", "batch_size", "learning_rate", "evaluations", "shown_tokens")
        folder = self.output_dir / "students" / method
        with self._phase(f"student {method}", folder, key) as phase:
            if not phase.is_done:
                phase.finish(self._train(method, folder))
        if method == "slim":
            self._mean_weight = phase.result["kd_weight"]
        return phase.result

    def _train(self, method: str, folder: Path) -> dict[str, Any]:
        settings, student = self.settings, copy.deepcopy(self.start)
        stores = Store(self.stores / "train"), Store(self.stores / "heldout")
        tokenizer = AutoTokenizer.from_pretrained(self.text / "tokenizer")
        documents, labels = len(stores[0]), stores[0].num_rows
        factor = f", KL x {self._kd_weight(method):.2f}, the mean of slim's weights" if method == "kd" else ""
        say(
            self.console,
            f"student {method}: {settings.epochs} epochs over {documents} documents, {labels:,} labels{factor}",
        )
        with progress_bar(self.console, "steps") as update:
            result = train_and_measure(
                student,
                tokenizer,
                stores,
                folder,
                evaluations=settings.evaluations,
                progress=update,
                method=method,
                kd_weight=self._kd_weight(method),
                **self._recipe(),
            )
        return result | {"shown": self._continued(student)}

    def _kd_weight(self, method: str) -> float | None:
        """Returns the factor of a method's divergence; None is the method's default, 0 with sft and 3 with slim."""
        return round(self._mean_weight, 4) if method == "kd" else None

    def _recipe(self) -> dict[str, Any]:
        """Returns the fields of the trainer's configuration that are the same for every student."""
        settings = self.settings
        return {
            "num_train_epochs": settings.epochs,
            "per_device_train_batch_size": settings.batch_size,
            "learning_rate": settings.learning_rate,
            "seed": settings.seed,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.1,
            "bf16": self._is_bfloat16,
            "use_cpu": True,
            "save_strategy": "no",
        }

    def next_command(self) -> str:
        """Returns a shell command that trains one more student on the demonstration's store by the same recipe."""
        out, recipe = self.output_dir, self._recipe()
        arguments = ["train", "--store", out / "store" / "train", "--eval-store", out / "store" / "heldout"]
        arguments += ["--student", self.settings.teacher, "--layers", ",".join(map(str, self.settings.layers))]
        arguments += ["--method", "slim", "--rest", "ghost"]
        for flag, field in _RECIPE_FLAGS.items():
            arguments += [flag, f"{recipe.pop(field):g}"]
        for name, value in recipe.items():
            arguments += ["--option", f"{name}={value if isinstance(value, str) else json.dumps(value)}"]
        arguments += ["--out", out / "students" / "healed-with-rest"]
        return shlex.join(map(str, [*_program(), *arguments]))

    @functools.cached_property
    def start(self) -> PreTrainedModel:
        """The student that every training starts from, in float32."""
        return drop_layers(load_model(self.settings.teacher), self.settings.layers)

    def _continued(self, student: PreTrainedModel) -> str:
        tokenizer = AutoTokenizer.from_pretrained(self.text / "tokenizer")
        return continued(student, tokenizer, self.shown_prompt, self.settings)

    def _load_teacher(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        if self._teacher is None:
            converted = (
                " (its GGUF file is converted on first use)" if self.settings.teacher in EMBEDDED_TEACHERS else ""
            )
            say(self.console, f"loading the teacher {self.settings.teacher}{converted}")
            dtype = getattr(torch, self.settings.teacher_dtype)
            self._teacher = load_teacher(self.settings.teacher, dtype=dtype)
        return self._teacher

    @property
    def _is_bfloat16(self) -> bool:
        return self.settings.teacher_dtype == "bfloat16"

    @property
    def _text_key(self) -> dict[str, Any]:
        return self._key(
            *("teacher", "teacher_dtype", "heldout_every", "tokens", "max_new_tokens"),
            *("sampling_temperature", "sampling_top_k", "shown_tokens", "seed"),
        )

    @property
    def _store_key(self) -> dict[str, Any]:
        return self._text_key | self._pick("top_fraction")

    def _key(self, *names: str) -> dict[str, Any]:
        prompts = hashlib.sha256("\n".join(self.prompts).encode()).hexdigest()[:16]
        return {"version": __version__, "prompts": prompts} | self._pick(*names)

    def _phase(self, name: str, folder: Path, key: dict[str, Any]) -> Phase:
        return Phase(name, folder, key, self.seconds, self.console)

    def _pick(self, *names: str) -> dict[str, Any]:
        return self.as_json({name: getattr(self.settings, name) for name in names})

    @staticmethod
    def as_json(content: dict[str, Any]) -> dict[str, Any]:
        """Returns the content as it is read back from a file, where a tuple is a list."""
        return json.loads(json.dumps(content))


def _program() -> list[str]:
    """Returns the words that run this program in the user's shell, where its environment may not be active."""
    python = Path(sys.executable)
    script = shutil.which("slimkernels")
    if script is not None and Path(script).parent == python.parent:
        return ["slimkernels"]
    inside = python.is_relative_to(Path.cwd())
    return [str(python.relative_to(Path.cwd()) if inside else python), "-m", "slimkernels"]
