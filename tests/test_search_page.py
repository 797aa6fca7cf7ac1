"""The page of a trace: its content, its safety against hostile text, and its rendering in a real browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch
from support.toy_engines import ScriptedEngine

from slimkernels.search import PathFinder, PathFinderConfig, Question, Tree, log_probability, read_trace
from slimkernels.search.question import Progress
from slimkernels.search.trace import TracedQuestion
from slimkernels.search.tree_page import tree_page

HOSTILE = "<script>document.body.remove()</script>"
# Every leaf gets two children and one is kept, which makes a chain with a pruned sibling at each depth.
SCRIPT = {
    "": [(f"{HOSTILE}\n", -1.0), ("other\n", -2.0)],
    f"{HOSTILE}\n": [("if a < b & c\n", -1.0), ("worse\n", -2.0)],
    f"{HOSTILE}\nif a < b & c\n": [("$", -1.0), ("  $", -1.5)],
}
VOID = {"meta", "input", "br"}


class Page(HTMLParser):
    """A parser of a page's elements, their classes and texts, which fails if elements are not nested properly."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[tuple[str, list[str]]] = []
        self.found: list[tuple[str, dict, list[str]]] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs), []))
        if tag not in VOID:
            self.open.append((tag, self.found[-1][2]))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open:
            self.open[-1][1].append(data)

    def texts(self, name: str) -> list[str]:
        return ["".join(texts).strip() for _, attrs, texts in self.found if name in attrs.get("class", "").split()]

    def tags(self) -> list[str]:
        return [tag for tag, _, _ in self.found]


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.jsonl"
    config = PathFinderConfig(branching_factor=2, beam=1, buffer_size=3, max_depth=3, max_step_tokens=50)
    questions = [Question("Q", f"What is {HOSTILE}?"), Question("R", "And then?")]
    engine = ScriptedEngine({"Q": SCRIPT, "R": {"": [("$", -1.0), ("$", -1.0)]}})
    PathFinder(engine, config, checks=(), selector=log_probability).solve(questions, trace=path)
    return path


def test_page_shows_every_node_with_its_text_score_and_end(trace):
    content = read_trace(trace)
    page = Page(tree_page(content))
    tree = content.questions[0].progress.tree
    steps = page.texts("step")
    assert steps[:6] == [HOSTILE, "if a < b & c", "", "", "worse", "other"]
    assert sum(tag == "li" for tag in page.tags()) == len(tree) - 1 + 2
    assert page.texts("label") == ["expanded", "expanded", "chosen", "finished", "pruned", "pruned", "empty", "empty"]
    text = tree_page(content)
    for node in range(1, len(tree)):
        assert f"score {tree.scores([node], 1.0)[0]:.3f}" in text
    assert [attrs["class"] for tag, attrs, _ in page.found if tag == "li"] == [
        *["expanded branch", "expanded branch", "finished branch", "finished", "pruned", "pruned"],
        *["cut", "cut"],
    ]
    opened = [
        "open" in attrs for tag, attrs, _ in page.found if tag == "details" and "question" in attrs.get("class", "")
    ]
    assert opened == [True, False], "the first tree is shown without a click"
    assert "2 attempts" in text
    assert "selector" in text
    assert "No answer." in text


def test_page_escapes_all_text_and_asks_for_nothing(trace):
    text = tree_page(read_trace(trace))
    page = Page(text)
    assert page.tags().count("script") == 1
    assert HOSTILE not in text
    assert text.count("&lt;script&gt;") >= 3, "in the question, the answer and the node"
    assert not {"img", "link", "iframe", "object"} & set(page.tags())
    assert not [attrs for _, attrs, _ in page.found if {"src", "href"} & set(attrs)]
    assert "default-src 'none'" in text
    assert not re.search(r"url\(|@import|https?:", text)


def test_page_of_some_questions_and_of_a_search_that_goes_on(trace):
    lines = trace.read_bytes().splitlines(keepends=True)
    trace.write_bytes(b"".join(lines[:2]) + lines[2][:20])
    content = read_trace(trace)
    page = Page(tree_page(content, [0]))
    assert page.texts("step") == [HOSTILE, "other"]
    assert page.texts("label") == ["open", "pruned"]
    assert "in progress" in tree_page(content, [0])
    assert "And then?" not in tree_page(content, [0])


def test_page_of_a_deep_tree_is_not_recursive(trace):
    tree = Tree()
    for parent in range(1100):
        tree.add(parent, 0, [97], "a\n", -1.0)
    content = read_trace(trace)
    deep = TracedQuestion(Question("Q", "deep"), Progress(tree), None)
    assert Page(tree_page(content._replace(questions=[deep]))).tags().count("li") == 1100


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def screenshot(page, out, *options):
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *options]
    subprocess.run([*command, f"--screenshot={out}", page.as_uri()], check=True, capture_output=True, timeout=900)
    from PIL import Image

    with Image.open(out) as image:
        return torch.tensor(list(image.convert("RGB").tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)


@pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on PATH")
def test_page_in_a_browser_is_drawn_light_and_dark_and_fits_a_phone(trace, tmp_path):
    pytest.importorskip("PIL", reason="the picture is read with pillow")
    page = tmp_path / "page.html"
    page.write_text(tree_page(read_trace(trace), [0]), encoding="utf-8")
    phone = "--window-size=390,700"
    light = screenshot(page, tmp_path / "light.png", phone, "--blink-settings=preferredColorScheme=1")
    dark = screenshot(page, tmp_path / "dark.png", phone, "--blink-settings=preferredColorScheme=0")
    assert light.shape == dark.shape == (700, 390, 3)
    assert light[0, 0].tolist() == [255, 255, 255]
    assert dark[0, 0].tolist() == [20, 23, 26]
    for picture, blue in ((light, (18, 87, 184)), (dark, (134, 182, 255))):
        on_frame = (picture == torch.tensor(blue, dtype=torch.uint8)).all(-1)
        assert on_frame.any(1).sum() > 60, "the three steps of the chosen branch are framed, by a script unharmed"
        columns = on_frame.any(0).nonzero()
        assert columns.min() >= 16
        assert columns.max() < 390 - 16, "nothing is wider than the screen"
    # A page that is too wide would continue at the right edge.
    assert (light[:, -8:] == 255).all()
