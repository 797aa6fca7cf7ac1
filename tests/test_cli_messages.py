"""What commands say: errors that name flags, options that would do nothing, and what a training and a capture print."""

from __future__ import annotations

import argparse
import io
import json
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from rich.console import Console
from support import evaluation, teachers
from support.commands import parsers

from slimkernels import _checks
from slimkernels.cli import errors, main, terminal, train
from slimkernels.ops import _divergences
from slimkernels.teacher import capture

ROOT = Path(__file__).parents[1]
CORPUS = ["When the rain stopped, Anna put on her boots.", "The apple trees were still wet.", "A black cat slept."]
QUICK = ["--batch-size", "2", "--option", "use_cpu=true"]
# Flags that mean different things in different commands, or accept more in one of them.
DIFFERENT = {"--out", "--model", "--teacher", "--samples", "--answer-kind", "--codec"}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a teacher, its store, a corpus and questions."""
    folder = tmp_path_factory.mktemp("made")
    teachers.save_teacher(folder / "teacher")
    tokenizer = teachers.make_tokenizer()
    capture(teachers.make_teacher(), tokenizer, [tokenizer(text).input_ids for text in CORPUS], folder / "store")
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in CORPUS))
    (folder / "own.jsonl").write_text('{"question": "1 + 1?", "answer": 2}\n')
    evaluation.make_data(folder / "data")
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch) -> Path:
    """An empty working directory, with links to what is made."""
    for path in made.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(command: str, capsys) -> str:
    assert main(command.split()) == 2
    return capsys.readouterr().err.strip().splitlines()[-1].removeprefix("slimkernels: ")


CAPTURE = "capture --teacher teacher --out out"
SERVED = "capture --server http://localhost:1/v1 --model m --tokenizer teacher --out out"
DECODE = "decode --model teacher"
COMPARE = "compare --models teacher --out out --data data"
COMPARE_SERVERS = "compare --models http://localhost:1/v1#m B=http://localhost:1/v1#n --out out --data data"
HELDOUT = "compare --models teacher --out out --tasks heldout --store store"
TRAIN = "train --store store --out out --method"


@pytest.mark.parametrize(
    ("command", "flag", "reason"),
    [
        (f"{CAPTURE} --text corpus.jsonl --concurrency 3", "--concurrency", "with --teacher"),
        (f"{CAPTURE} --text corpus.jsonl --model m", "--model", "with --teacher"),
        (f"{CAPTURE} --text corpus.jsonl --temperature 2", "--temperature", "with --text"),
        (f"{CAPTURE} --text corpus.jsonl --max-new-tokens 2", "--max-new-tokens", "with --text"),
        (f"{CAPTURE} --text corpus.jsonl --seed 2", "--seed", "with --text"),
        (f"{CAPTURE} --text corpus.jsonl --rounds 2", "--rounds", "without --select"),
        (f"{CAPTURE} --prompts --tokens 9 --max-length 9", "--max-length", "with --prompts"),
        (f"{CAPTURE} --prompts --tokens 9 --text-field q", "--text-field", "with the prompts that come with"),
        (f"{SERVED} --prompts --threads 2", "--threads", "with --server"),
        (f"{SERVED} --prompts --tokens 20", "--tokens", "with --server and --prompts"),
        (f"{SERVED} --text corpus.jsonl --temperature 2", "--temperature", "with --text"),
        (f"{DECODE} Anna? --question-field q", "--question-field", "without --questions"),
        (f"{DECODE} Anna? --samples 3", "--samples", "without --questions"),
        (f"{DECODE} Anna? --plan --out o.jsonl", "--out", "with --plan"),
        (f"{DECODE} Anna? --tokenizer teacher", "--tokenizer", "with a model that runs here"),
        ("decode --model http://localhost:1/v1#m Anna? --dtype bfloat16", "--dtype", "with a server"),
        (f"{COMPARE} --tasks gsm8k --question-field q", "--question-field", "without questions of your own"),
        (f"{COMPARE} --tasks gsm8k --num-fewshot 2", "--num-fewshot", "without a multiple-choice task"),
        (f"{COMPARE} --tasks gsm8k --chains 2", "--chains", "without --decoders self-consistency"),
        (f"{COMPARE} --tasks gsm8k --beam 2", "--beam", "without --decoders pathfinder"),
        (f"{COMPARE} --tasks gsm8k --temperature 2", "--temperature", "with --decoders greedy"),
        (f"{COMPARE} --tasks gsm8k --seeds 1 2", "--seeds", "with --decoders greedy"),
        (f"{COMPARE} --tasks gsm8k --judge-key-env K", "--judge-key-env", "without --judge"),
        (f"{COMPARE} --tasks own=own.jsonl", "--data", "without a task whose questions it holds"),
        ("compare --rescore --out out --samples 3", "--samples", "with --rescore"),
        ("compare --outputs o.jsonl --out out --shots 2", "--shots", "with --outputs"),
        (f"{COMPARE} --tasks gsm8k --key-env K", "--key-env", "without a server"),
        (f"{COMPARE} --tasks gsm8k --tokenizer teacher", "--tokenizer", "without a server"),
        (f"{COMPARE} --tasks gsm8k --batch-size 2", "--batch-size", "without --tasks heldout or a multiple-choice"),
        (f"{COMPARE_SERVERS} --tasks gsm8k --dtype bfloat16", "--dtype", "with servers"),
        (f"{HELDOUT} --decoders pathfinder", "--decoders", "without questions that the models answer"),
        (f"{HELDOUT} --max-tokens 9", "--max-tokens", "without questions that the models answer"),
        (f"{HELDOUT} --prompt-style plain", "--prompt-style", "without questions that the models answer"),
        ("eval --store store --model teacher --samples 3", "--samples", "with eval"),
        ("eval --store store --model teacher --dtype bfloat16", "--dtype", "with eval"),
        (f"{DECODE} Anna? --answer-pattern x --answer-kind number", "--answer-kind", "with --answer-pattern"),
        (f"{TRAIN} kd --max-steps 1 --epochs 2", "--epochs", "with --max-steps"),
        (f"{TRAIN} sft --rest ghost", "--rest", "with --method sft"),
        (f"{TRAIN} sft --temperature 2", "--temperature", "with --method sft"),
        (f"{TRAIN} sft --option token_weight=none", "--option token_weight", "with --method sft"),
        (f"{TRAIN} sft --teacher teacher", "--teacher", "with --method sft"),
        (f"{TRAIN} kd --option sampling_temperature=2", "--option sampling_temperature", "without --method gkd"),
        (f"{TRAIN} kd --option teacher_top_k=2", "--option teacher_top_k", "without --teacher"),
        (f"{TRAIN} kd --option beta=0.1", "--option beta", "without the divergence jsd or ab"),
        (
            f"{TRAIN} jsd --option alpha=0.2",
            "--option alpha",
            "without the divergence skew_kl or skew_reverse_kl or ab",
        ),
        (f"{TRAIN} jsd --option entropy_threshold=1", "--option entropy_threshold", "without the divergence gated"),
        ("store verify store --tokenizer teacher", "--tokenizer", "without --complete"),
        ("store verify store --max-length 9", "--max-length", "without --complete"),
        ("store import --format megatron data o --tokenizer t --samples s --alignment same", "--alignment", "megatron"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused_by_name(command, flag, reason, here, capsys):
    message = refused(command, capsys)
    assert message.startswith(f"{flag} has no meaning ")
    assert reason in message
    assert message.endswith(": omit it")
    assert not (here / "out").exists()


def test_a_seed_of_draws_has_a_meaning_with_a_text(here):
    command = f"{CAPTURE} --text corpus.jsonl --select sample --rounds 3 --seed 2"
    assert main(command.split()) == 0


def test_prompts_of_a_file_have_the_field_that_is_named(here):
    (here / "prompts.jsonl").write_text('{"q": "When the rain"}\n')
    words = f"{CAPTURE} --prompts prompts.jsonl --text-field q --documents 1 --max-new-tokens 3"
    assert main(words.split()) == 0
    assert json.loads((here / "out.jsonl").read_text().splitlines()[0])["prompt"] == "When the rain"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (f"{CAPTURE} --text corpus.jsonl --top-p 1.5", "--top-p must lie in (0, 1], got 1.5"),
        (
            f"{CAPTURE} --text corpus.jsonl --top-p 0.5 --select sample",
            "--top-p must be omitted with --select sample, whose",
        ),
        (
            f"{CAPTURE} --text corpus.jsonl --select mixed --temperatures 2",
            "--temperatures must be (1.0,) with --select",
        ),
        (
            f"{CAPTURE} --prompts --documents 1 --sample-top-k 999 --max-new-tokens 3",
            "--sample-top-k must be at most the vocabulary",
        ),
        (f"{DECODE} --beam 0 Anna?", "--beam must be an integer of at least 1"),
        (f"{DECODE} --time-limit 0 Anna?", "--time-limit must be positive"),
        # An option that had another name in an earlier release.
        (f"{DECODE} --max-tokens 0 Anna?", "--max-tokens must be at least --max-step-tokens = 64"),
        (
            "compare --models teacher --out out --tasks own=own.jsonl --decoders pathfinder --branching-factor 0",
            "--branching-factor must be at least 1 at every depth",
        ),
        ("train --store store --method gkd --out out", "needs a --teacher or --teacher-server to score"),
        ("train --store store --method slim --out out --option teacher_top_k=3", "--option teacher_top_k"),
    ],
)
def test_an_error_names_the_flags_of_its_command(command, message, here, capsys):
    found = refused(command, capsys)
    assert message in found
    names = {action.dest for parser in parsers() for action in parser._actions if "_" in action.dest}
    assert not names & set(re.findall(r"(?<!--option )(?<![\w-])\w+_\w+", found))


ABSENT_CAPTURE = "capture --teacher ./absent --out out --text corpus.jsonl"
ABSENT_PROMPTS = "capture --teacher ./absent --out out --prompts --documents 1"
ABSENT_SERVED = "capture --server http://localhost:1/v1 --model m --tokenizer ./absent --out out --prompts"
ABSENT_LOGITS = "capture --logits absent.npy --model m --tokenizer ./absent --out out --text corpus.jsonl"
ABSENT_HIDDEN = "capture --hidden absent --head ./absent --out out"
ABSENT_TRAIN = "train --store store --student ./absent --out out --method"
ABSENT_DECODE = "decode --model ./absent Anna?"
ABSENT_COMPARE = "compare --models ./absent --out out --tasks own=own.jsonl"
ABSENT_GSM8K = "compare --models ./absent --out out --tasks gsm8k --data data"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (f"{ABSENT_CAPTURE} --top-fraction 1.5", "--top-fraction must be in (0, 1], got 1.5"),
        (f"{ABSENT_CAPTURE} --top-p 0", "--top-p must lie in (0, 1], got 0.0"),
        (f"{ABSENT_CAPTURE} --temperatures 1 -2", "--temperatures must be positive and finite, got -2.0"),
        (f"{ABSENT_CAPTURE} --parts 65537", "--parts must be an int in [1, 65536], or None, got 65537"),
        (f"{ABSENT_CAPTURE} --select mixed --rounds 3000000000", "--rounds must be an integer of at least 1 and below"),
        (f"{ABSENT_CAPTURE} --codec hidden8 --top-p 0.5", "--top-p must be omitted with --codec hidden8"),
        (f"{ABSENT_CAPTURE} --codec hidden8 --select sample", "--select must be 'top_k' with --codec hidden8"),
        (f"{ABSENT_PROMPTS} --temperature -1", "--temperature must be finite and at least 0, got -1.0"),
        (f"{ABSENT_PROMPTS} --seed -1", "--seed must be at least 0, got -1"),
        (f"{ABSENT_SERVED} --temperature nan", "--temperature must be finite and at least 0, got nan"),
        (f"{ABSENT_SERVED} --max-unmapped 2", "--max-unmapped must be in [0, 1], got 2.0"),
        (f"{ABSENT_SERVED} --seed -1", "--seed must be in [0, 2.14748e+09], got -1"),
        (f"{ABSENT_SERVED} --max-retries -1", "--max-retries must be an int of at least 0, got -1"),
        (f"{ABSENT_SERVED} --requests-per-minute 0", "--requests-per-minute must be positive and finite, got 0.0"),
        (f"{ABSENT_LOGITS} --top-fraction 0", "--top-fraction must be in (0, 1], got 0.0"),
        (f"{ABSENT_HIDDEN} --temperatures 0", "--temperatures must be positive and finite, got 0.0"),
        (f"{ABSENT_TRAIN} kd --learning-rate -1", "--learning-rate must be finite and at least 0, got -1.0"),
        (f"{ABSENT_TRAIN} kd --epochs nan", "--epochs must be finite and at least 0, got nan"),
        (f"{ABSENT_TRAIN} kd --seed -1", "--seed must be in [0, 2^32), got -1"),
        (f"{ABSENT_TRAIN} kd --kd-weight -1", "--kd-weight must be finite and at least 0, got -1.0"),
        (f"{ABSENT_TRAIN} kd --temperature 0", "--temperature must be positive and finite, got 0.0"),
        (f"{ABSENT_TRAIN} kd --temperature 3 --rest ghost", "is not among the teacher's"),
        (f"{ABSENT_TRAIN} kd --divergence tvd --rest renorm", "--rest must be "),
        (f"{ABSENT_TRAIN} kd --schedule kd_weight=linear:0:-1", "the schedule of --kd-weight leaves its range"),
        (f"{ABSENT_TRAIN} kd --option label_smoothing=1", "--option label_smoothing must be in [0, 1), got 1"),
        (f"{ABSENT_TRAIN} kd --option tail_weight=text", "--option tail_weight must be a number, got str 'text'"),
        (f"{ABSENT_TRAIN} kd --option weight_decay=-1", "weight_decay must be finite and at least 0, got -1"),
        (f"{ABSENT_TRAIN} kd --option adam_beta1=1", "adam_beta1 must be in [0, 1), got 1"),
        (f"{ABSENT_TRAIN} gkd", "needs a --teacher or --teacher-server to score"),
        (f"{ABSENT_TRAIN} sampled", "needs a store of draws"),
        (f"{ABSENT_TRAIN} kd --teacher ./absent --option teacher_top_fraction=0", "must be in (0, 1], got 0"),
        (f"{ABSENT_TRAIN} sampled --teacher ./absent --option teacher_rounds=0", "must be an int of at least 1, got 0"),
        (f"{ABSENT_DECODE} --nli ./absent --contradiction-threshold 2", "--contradiction-threshold must be in [0, 1]"),
        (f"{ABSENT_DECODE} --repetition-threshold -1", "--repetition-threshold must be in [0, 1], got -1.0"),
        (f"{ABSENT_DECODE} --score-steps http://localhost:1/v1", "--score-steps must name a model of the server"),
        (f"{ABSENT_DECODE} --template {{query}}", "--template must contain {question}"),
        (f"{ABSENT_DECODE} --device gpu", "--device must be a device of torch such as cpu or cuda:0, got 'gpu'"),
        (f"{ABSENT_COMPARE} --decoders beams", "--decoders must be one of greedy, self-consistency, pathfinder"),
        (f"{ABSENT_COMPARE} --max-depth 0", "--max-depth must be an integer of at least 1"),
        (f"{ABSENT_COMPARE} --batch-questions 0", "--batch-questions must be an integer of at least 1"),
        (f"{ABSENT_COMPARE} --decoders pathfinder --beam 0", "--beam must be an integer of at least 1"),
        (f"{ABSENT_GSM8K} --shots -1", "--shots must be "),
        (
            "decode --model http://localhost:1/v1#m --nli ./absent --selector verifier Anna?",
            "--selector verifier needs --verifier MODEL with a server",
        ),
    ],
)
def test_an_argument_is_refused_before_a_model_is_looked_for(command, message, here, capsys):
    assert message in refused(command, capsys)


@pytest.mark.parametrize(
    "command", [ABSENT_CAPTURE, ABSENT_PROMPTS, ABSENT_HIDDEN, f"{ABSENT_TRAIN} kd", ABSENT_DECODE, ABSENT_COMPARE]
)
def test_a_model_that_is_absent_is_what_good_arguments_fail_for(command, here, capsys):
    assert "absent" in refused(command, capsys)


def test_eval_looks_for_every_model_before_it_evaluates_one(here, capsys, monkeypatch):
    from slimkernels.models import heldout

    monkeypatch.setattr(heldout, "evaluate_store", lambda *_, **__: pytest.fail("a model was evaluated"))
    assert "./absent" in refused("eval --store store --model teacher ./absent", capsys)


@pytest.mark.parametrize("number", ["0", "-1", "1.5", str(2**63), "9" * 5000])
def test_a_count_is_a_whole_number_of_64_bits(number, capsys):
    with pytest.raises(SystemExit):
        main(["capture", "--teacher", "t", "--out", "o", "--documents", number])
    expected = "must be below 2^63" if len(number) > 3 else "must be a whole number of at least 1"
    assert f"argument --documents: {expected}, got " in capsys.readouterr().err


def test_the_checkpoint_of_another_run_is_described_by_flags(here, capsys):
    command = ["train", "--store", "store", "--out", "out", "--max-steps", "1", *QUICK]
    assert main([*command, "--method", "kd"]) == 0
    capsys.readouterr()
    found = refused(" ".join([*command, "--method", "kd", "--learning-rate", "0.01"]), capsys)
    assert "the newest checkpoint in --out must be a checkpoint of the same run" in found
    assert "--learning-rate 0.006 there, 0.01 here" in found
    assert found.endswith("give this run an --out of its own")


def test_flags_replace_names_alone():
    flags = {"top_p": "--top-p", "seed": "--seed", "documents": "", "select": "--select"}
    said = {
        "top_p must be None with select='top_k', got 0.5": "--top-p must be omitted with --select top-k, got 0.5",
        "the file 'a/top_p.txt' of top_p_x": "the file 'a/top_p.txt' of top_p_x",
        "a seed of the draws; seed must be at least 0": "a seed of the draws; --seed must be at least 0",
        "documents must hold at least one document": "documents must hold at least one document",
        "was made with seed=3": "was made with --seed 3",
    }
    for message, expected in said.items():
        assert errors.with_flags(message, flags, {"top-k"}) == expected


@pytest.mark.parametrize(
    ("package", "advice"),
    [
        ("pyarrow.parquet", "'slimkernels[exchange]'"),
        ("lm_eval", "'slimkernels[harness]'"),
        ("some_package", "some_package"),
    ],
)
def test_a_missing_package_is_named_with_the_extra_that_has_it(package, advice):
    error = ModuleNotFoundError("No module", name=package)
    sentence = errors.sentence_of(error, argparse.Namespace())
    assert sentence == f"the package {package.partition('.')[0]} is not installed: pip install {advice}"


def test_every_extra_lists_the_package_that_it_is_named_for():
    text = (ROOT / "pyproject.toml").read_text()
    distributions = {"yaml": "pyyaml", "rouge_score": "rouge-score", "lm_eval": "lm-eval"}
    for package, extra in errors.EXTRAS.items():
        (listed,) = re.findall(rf"^{extra} = (.*)$", text, re.M)
        assert f'"{distributions.get(package, package)}>=' in listed, package


def test_a_flag_has_one_metavar_and_one_list_of_choices():
    found = defaultdict(set)
    for parser in parsers():
        for action in parser._actions:
            if action.help != argparse.SUPPRESS:
                for flag in action.option_strings:
                    found[flag].add((action.metavar, tuple(action.choices or ())))
    assert {flag: forms for flag, forms in found.items() if len(forms) > 1 and flag not in DIFFERENT} == {}
    metavars = {metavar for forms in found.values() for metavar, _ in forms}
    assert not metavars & {"INT", "FLOAT", "STR", "BOOL"}


def test_train_accepts_what_the_loss_accepts():
    assert (train.RESTS, train.DIVERGENCES) == (_checks.RESTS, _divergences.DIVERGENCES)


def test_a_finished_training_says_so_and_is_not_trained_on(here, capsys, caplog):
    """Two steps are half of the second epoch, where the trainer would take one step more."""
    command = ["train", "--store", "store", "--method", "slim", "--out", "out", "--max-steps", "3", *QUICK]
    assert main(command) == 0
    student = (here / "out" / "model.safetensors").read_bytes()
    assert "finished" not in caplog.text
    caplog.clear()
    capsys.readouterr()
    assert main(command) == 0
    assert "the training in out is finished, after 3 steps: nothing was trained" in caplog.text
    assert "train_loss" not in capsys.readouterr().out
    assert (here / "out" / "model.safetensors").read_bytes() == student
    assert [path.name for path in (here / "out").glob("checkpoint-*")] == ["checkpoint-3"]


def test_train_prints_every_metric_once(here, capsys):
    command = ["train", "--store", "store", "--method", "slim", "--out", "out", "--max-steps", "2", *QUICK]
    assert main([*command, "--eval-store", "store", "--option", "logging_steps=1"]) == 0
    printed = capsys.readouterr().out
    for name in ("train_runtime", "train_loss", "eval_perplexity", "eval_kl_ghost"):
        assert printed.count(name) == 1, name
    assert printed.count("'loss':") == 2


@pytest.mark.parametrize("student", ["folder", "new"])
def test_train_saves_the_tokenizer_that_it_finds(student, here, capsys):
    """That of the student's folder, or of the store's teacher where a folder of its name is here."""
    given = ["--student", "teacher"] if student == "folder" else []
    if student == "new":
        words = "capture --teacher teacher --text corpus.jsonl --out named"
        assert main(words.split()) == 0
    store = "store" if student == "folder" else "named"
    command = ["train", "--store", store, "--method", "slim", "--out", "out", "--max-steps", "1", *QUICK, *given]
    assert main(command) == 0
    assert (here / "out" / "tokenizer.json").exists()
    assert "without a tokenizer" not in capsys.readouterr().err
    words = "decode --model out --decoder greedy --max-depth 1 --max-step-tokens 2 --template {question} Anna"
    assert main(words.split()) == 0


def test_train_says_at_once_that_no_tokenizer_is_saved(here, capsys):
    command = "train --store store --method slim --out out --student absent"
    assert main(["train", "--store", "store", "--method", "slim", "--out", "out", "--max-steps", "1", *QUICK]) == 0
    assert "the student is saved without a tokenizer; decode and compare need one" in capsys.readouterr().err
    assert main(command.split()) == 2


def test_train_says_that_the_students_tokenizer_is_another(here, capsys):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    teachers.save_teacher(here / "other")
    words = {"a": 0, "b": 1, "[UNK]": 2}
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="[UNK]")), unk_token="[UNK]")
    other.save_pretrained(here / "other")
    command = ["train", "--store", "store", "--method", "slim", "--out", "out", "--max-steps", "1", *QUICK]
    assert main([*command, "--student", "other"]) == 0
    assert "the tokenizer of other is not the one that the store was captured with" in capsys.readouterr().err
    assert not (here / "out" / "tokenizer.json").exists()


def test_a_bar_shows_a_total_only_where_it_is_known():
    with terminal.progress_bars() as progress:
        known, unknown = (terminal.progress_task(progress, name) for name in ("known", "unknown"))
        known(3, 7)
        unknown(5, None)
        output = io.StringIO()
        Console(file=output, width=80).print(progress.get_renderable())
    assert "3/7" in output.getvalue()
    assert "?" not in output.getvalue()
    assert re.search(r"unknown .* 5 ", output.getvalue())


def test_capture_of_generated_text_shows_its_number_of_tokens(here, monkeypatch):
    from slimkernels.cli import capture as module

    shown = []
    monkeypatch.setattr(module, "progress_task", lambda _, name: lambda *of: shown.append((name, *of)))
    words = f"{CAPTURE} --prompts --documents 3 --max-new-tokens 3"
    assert main(words.split()) == 0
    name, done, total = shown[-1]
    assert name == "captured tokens"
    assert done == total > 0


def test_compare_names_the_sample_that_a_model_cannot_read(here, capsys):
    (here / "own.jsonl").unlink()
    (here / "own.jsonl").write_text(json.dumps({"question": "long " * 400, "answer": 2}) + "\n")
    message = refused("compare --models teacher --out out --tasks riddles=own.jsonl", capsys)
    assert re.match(
        r"teacher cannot read sample \S+ of task riddles with --shots \d: the prompt must be shorter", message
    )


def test_decode_names_the_question_that_a_model_cannot_read(here, capsys):
    lines = [json.dumps({"question": text}) for text in ("Anna?", "long " * 400)]
    (here / "questions.jsonl").write_text("\n".join(lines))
    for command in (f"{DECODE} --questions questions.jsonl", f"{DECODE} --questions questions.jsonl --plan"):
        assert refused(command, capsys).startswith("question 2: the prompt must be shorter than the model's context")


def test_lm_eval_that_is_missing_is_one_sentence():
    code = """if True:
        import importlib.util, runpy, sys
        find = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *of: None if name == "lm_eval" else find(name, *of)
        runpy.run_module("slimkernels.evaluate.lm_eval", run_name="__main__")
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 1
    assert done.stderr == "slimkernels: lm-eval is not installed: pip install 'slimkernels[harness]'\n"


@pytest.mark.parametrize("example", ["plain_loop", "lightning_module"])
def test_an_example_without_arguments_shows_its_usage(example):
    if example == "lightning_module":
        pytest.importorskip("lightning", reason="needs the extra test")
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / f"{example}.py"], capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"usage: python examples/{example}.py STORE MODEL OUT"
    assert "Traceback" not in done.stderr
