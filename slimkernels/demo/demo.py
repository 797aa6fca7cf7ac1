"""The demonstration's phases: a teacher's own text, its logits in a store, one small student trained three ways."""

from __future__ import annotations

import dataclasses
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
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback

from slimkernels import __version__
from slimkernels._C import supported_cpu_isas
from slimkernels.demo.phases import Phase, progress_bar, quiet_libraries, say
from slimkernels.demo.report import report
from slimkernels.models.heldout import evaluate_store
from slimkernels.models.make_student import make_student
from slimkernels.store import Store, info
from slimkernels.teacher import EMBEDDED_TEACHERS, capture, generate_documents, load_teacher, shipped_prompts
from slimkernels.trainer import SlimConfig, SlimTrainer

SPLITS = ("train", "heldout")
# Methods that are compared.
STUDENTS = ("sft", "kd", "slim")


@dataclasses.dataclass(frozen=True)
class DemoSettings:
    """Sizes and options of the demonstration; the defaults take a few minutes on two CPU cores.

    Attributes:
        teacher: Name or folder, as ``load_teacher`` takes it.
        teacher_dtype: Dtype of the teacher's weights; "auto" is bfloat16 on processors with bfloat16 instructions,
            where it halves the time, and float32 on others, where bfloat16 takes four times as long.
        prompts: Number of shipped prompts to use, from the first; the first 40 open stories.
        heldout_every: Distance between held-out prompts: one prompt in so many, with all its documents, is held out.
        documents: Number of documents that the teacher writes, over all prompts.
        max_new_tokens: Longest continuation of a prompt, in tokens.
        sampling_temperature: Temperature at which the teacher writes.
        sampling_top_k: Number of most probable tokens from which the teacher samples.
        top_fraction: Share of the vocabulary whose logits are kept in each row of the teacher.
        hidden_size: Hidden size D of the student.
        num_layers: Layers of the student.
        num_heads: Attention heads of the student.
        epochs: Passes over the training documents, the same for every method.
        batch_size: Documents per optimizer step.
        learning_rate: Peak learning rate, the same for every method; reached by a linear warm-up over a tenth of the
            steps and followed by a cosine decay.
        evaluations: Measurements on the held-out documents, spread evenly over each training.
        seed: Random seed of the teacher's sampling, the student's initialisation and the order of the documents.
    """

    teacher: str = "smollm2-135m-instruct"
    teacher_dtype: str = "auto"
    prompts: int = 40
    heldout_every: int = 8
    documents: int = 256
    max_new_tokens: int = 120
    sampling_temperature: float = 0.8
    sampling_top_k: int = 40
    top_fraction: float = 0.05
    hidden_size: int = 128
    num_layers: int = 2
    num_heads: int = 4
    epochs: int = 4
    batch_size: int = 4
    learning_rate: float = 6e-3
    evaluations: int = 8
    seed: int = 0


# Fields of the recipe that have a flag of `slimkernels train`.
_RECIPE_FLAGS = {
    "--epochs": "num_train_epochs",
    "--batch-size": "per_device_train_batch_size",
    "--learning-rate": "learning_rate",
    "--seed": "seed",
}
QUICK = DemoSettings(documents=16, max_new_tokens=40, hidden_size=64, num_layers=1, epochs=2, evaluations=2)


def run_demo(
    output_dir: str | os.PathLike[str],
    *,
    quick: bool = False,
    seed: int | None = None,
    settings: DemoSettings | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Runs the phases of the demonstration that are not finished, and prints, plots and returns its numbers.

    The teacher continues short prompts. Some prompts are held out, with all their documents, before anything is
    captured. The teacher's largest logits of both parts are written into two stores. One student, with the same
    initialisation, documents, order and recipe each time, learns from the labels alone (sft), with the teacher's kept
    logits (kd), and with those weighted per token (slim).

    ``output_dir`` then holds ``text``, ``store/train``, ``store/heldout``, ``students/METHOD``, ``results.json`` and
    ``learning_curves.png``. A finished phase is reused if its settings are the same and run again if they differ. A
    phase that was stopped is continued (text, store) or started again (a student).

    Args:
        output_dir: Folder for all results; created if absent.
        quick: Whether to use much smaller sizes, whose numbers only show that everything works.
        seed: Random seed, in place of that of the settings.
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
    if seed is not None:
        settings = dataclasses.replace(settings, seed=seed)
    if settings.teacher_dtype == "auto":
        has_bfloat16 = "avx512_bf16" in supported_cpu_isas()
        settings = dataclasses.replace(settings, teacher_dtype="bfloat16" if has_bfloat16 else "float32")
    console = console or Console()
    start = time.perf_counter()
    say(console, f"{2 + len(STUDENTS)} phases: the teacher's text, the store of its logits, {len(STUDENTS)} students")
    with quiet_libraries():
        demo = _Demo(Path(output_dir), settings, console)
        demo.write_text()
        demo.capture_stores()
        students = {method: demo.train_student(method) for method in STUDENTS}
    results = {
        "version": __version__,
        "settings": dataclasses.asdict(settings),
        "store": info(demo.stores / "train"),
        "heldout": info(demo.stores / "heldout"),
        "students": students,
        "phase_seconds": demo.seconds,
    }
    report(results, demo.output_dir, console)
    say(
        console,
        f"curves in {demo.output_dir / 'learning_curves.png'}, all numbers in {demo.output_dir / 'results.json'}",
    )
    say(console, f"finished in {time.perf_counter() - start:.0f} s; next, train with another loss on the same store:")
    say(console, f"  {demo.next_command()}")
    return results


class _Demo:
    """The phases of one run, in the order in which they are called.

    Attributes:
        seconds: Wall time of each phase, by its name.
    """

    def __init__(self, output_dir: Path, settings: DemoSettings, console: Console) -> None:
        self.output_dir, self.settings, self.console = output_dir, settings, console
        self.text, self.stores = output_dir / "text", output_dir / "store"
        self.seconds: dict[str, float] = {}
        self.prompts = shipped_prompts()[: settings.prompts]
        self.heldout_prompts = set(self.prompts[:: settings.heldout_every])
        self._teacher: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None
        prompts = hashlib.sha256("\n".join(self.prompts).encode()).hexdigest()[:16]
        self._text_key = {"version": __version__, "prompts": prompts} | self._pick(
            *("teacher", "teacher_dtype", "heldout_every", "documents", "max_new_tokens"),
            *("sampling_temperature", "sampling_top_k", "seed"),
        )
        self._store_key = self._text_key | self._pick("top_fraction")

    def write_text(self) -> None:
        """Lets the teacher continue the prompts; each document is one line of ``text/documents.jsonl``."""
        settings = self.settings
        with self._phase("text", self.text, self._text_key) as phase:
            if phase.is_done:
                return
            model, tokenizer = self._load_teacher()
            tokenizer.save_pretrained(self.text / "tokenizer")
            say(
                self.console,
                f"text: the teacher writes {settings.documents} documents of up to {settings.max_new_tokens} tokens, "
                f"from {len(self.prompts)} prompts",
            )
            with progress_bar(self.console, "documents") as update:
                corpus = generate_documents(
                    model,
                    tokenizer,
                    self.prompts,
                    self.text / "documents.jsonl",
                    num_documents=settings.documents,
                    max_new_tokens=settings.max_new_tokens,
                    temperature=settings.sampling_temperature,
                    top_k=settings.sampling_top_k,
                    seed=settings.seed,
                    batch_size=64,
                    progress=update,
                )
            phase.finish({"documents": corpus.documents, "tokens": corpus.tokens})

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

    def train_student(self, method: str) -> dict[str, Any]:
        """Returns one method's held-out curve and speed, from a training now or one that was finished before."""
        key = self._store_key | {"method": method}
        key |= self._pick(
            "hidden_size", "num_layers", "num_heads", "epochs", "batch_size", "learning_rate", "evaluations"
        )
        folder = self.output_dir / "students" / method
        with self._phase(f"student {method}", folder, key) as phase:
            if not phase.is_done:
                phase.finish(self._train(method, folder))
        return phase.result

    def _train(self, method: str, folder: Path) -> dict[str, Any]:
        settings, store, heldout = self.settings, Store(self.stores / "train"), Store(self.stores / "heldout")
        tokenizer = AutoTokenizer.from_pretrained(self.text / "tokenizer")
        student = make_student(
            tokenizer=tokenizer,
            vocab_size=store.vocab_size,
            hidden_size=settings.hidden_size,
            num_layers=settings.num_layers,
            num_heads=settings.num_heads,
            seed=settings.seed,
        )
        config = SlimConfig(
            output_dir=str(folder),
            method=method,
            **self._recipe(),
            include_num_input_tokens_seen="non_padding",
            save_strategy="no",
            disable_tqdm=True,
        )
        say(
            self.console,
            f"student {method}: {settings.epochs} epochs over {len(store)} documents, {student.num_parameters():,} "
            "parameters",
        )
        with progress_bar(self.console, "steps") as update:
            curve = _HeldoutCurve(heldout, settings.evaluations, update)
            trainer = SlimTrainer(
                model=student, args=config, train_dataset=store, processing_class=tokenizer, callbacks=[curve]
            )
            # This callback would print every log; the result holds them.
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        trainer.save_model()
        return {
            "curve": curve.points,
            "train_seconds": curve.train_seconds,
            "train_tokens_per_second": curve.points[-1]["tokens_seen"] / curve.train_seconds,
            "parameters": student.num_parameters(),
            "logs": [entry for entry in trainer.state.log_history if "loss" in entry],
        }

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
            "use_cpu": True,
        }

    def next_command(self) -> str:
        """Returns a shell command that trains one more student on the demonstration's store by the same recipe."""
        out, recipe = self.output_dir, self._recipe()
        arguments = ["train", "--store", out / "store" / "train", "--eval-store", out / "store" / "heldout"]
        arguments += ["--tokenizer", out / "text" / "tokenizer", "--method", "slim", "--rest", "ghost"]
        for flag, field in _RECIPE_FLAGS.items():
            arguments += [flag, f"{recipe.pop(field):g}"]
        for name, value in recipe.items():
            arguments += ["--option", f"{name}={value}"]
        arguments += ["--out", out / "students" / "slim-ghost"]
        return shlex.join(map(str, [*_program(), *arguments]))

    def _load_teacher(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        if self._teacher is None:
            converted = (
                " (its GGUF file is converted on first use)" if self.settings.teacher in EMBEDDED_TEACHERS else ""
            )
            say(self.console, f"loading the teacher {self.settings.teacher}{converted}")
            dtype = getattr(torch, self.settings.teacher_dtype)
            self._teacher = load_teacher(self.settings.teacher, dtype=dtype)
        return self._teacher

    def _phase(self, name: str, folder: Path, key: dict[str, Any]) -> Phase:
        return Phase(name, folder, key, self.seconds, self.console)

    def _pick(self, *names: str) -> dict[str, Any]:
        return {name: getattr(self.settings, name) for name in names}


def _program() -> list[str]:
    """Returns the words that run this program in the user's shell, where its environment may not be active."""
    python = Path(sys.executable)
    script = shutil.which("slimkernels")
    if script is not None and Path(script).parent == python.parent:
        return ["slimkernels"]
    inside = python.is_relative_to(Path.cwd())
    return [str(python.relative_to(Path.cwd()) if inside else python), "-m", "slimkernels"]


class _HeldoutCurve(TrainerCallback):
    """Callback that measures the student on the held-out store before, during and after training.

    Attributes:
        points: Metrics of ``evaluate_store`` with the step and the tokens seen, one entry per measurement.
        train_seconds: Wall time of the training without the measurements.
    """

    def __init__(self, heldout: Store, evaluations: int, update) -> None:
        self.heldout, self.evaluations, self.update = heldout, evaluations, update
        self.points: list[dict[str, float]] = []
        self.train_seconds = 0.0

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        """Measures the untrained student."""
        self._measure(state, model)
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        """Measures where the next of the evenly spread measurements is due, last after the last step."""
        self.update(state.global_step, state.max_steps)
        if len(self.points) * state.max_steps <= state.global_step * self.evaluations:
            self.train_seconds += time.perf_counter() - self._start
            self._measure(state, model)
            self._start = time.perf_counter()

    def _measure(self, state, model) -> None:
        metrics = evaluate_store(model, self.heldout, batch_size=16)
        self.points.append({"step": state.global_step, "tokens_seen": int(state.num_input_tokens_seen)} | metrics)
