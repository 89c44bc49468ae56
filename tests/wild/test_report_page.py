"""The page, the card's section and the command, with texts that mean no good."""

import sqlite3
from html.parser import HTMLParser

import pytest
from typer.testing import CliRunner

from hfprune.cli import app
from hfprune.errors import CheckpointError
from hfprune.wild import report, summarise
from hfprune.wild.page import render_page
from hfprune.wild.report_card import BEGIN, END, with_section, write_section
from tests.support.wild_run import ten_words, write_run

EVIL = "</td><script>alert(1)</script><img src=x onerror=alert(2)>\x1b[31m\u202e[bold]"
ARABIC = "في من على أن إلى هذا التي الذي عن مع"
VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """Tags and attributes, and whether every tag is closed in its place."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    heard = {"dense": ten_words(1), f"small {EVIL}": ten_words(4)}
    items = [
        {"key": f"{n}", "title": EVIL, "category": EVIL, "language": ("en", "de")[n % 2], "reference": ten_words(0)}
        | {"url": ("javascript:alert(1)", "https://example.org/?a=1&b=2")[n % 2], "heard": heard}
        | {"conditions": {EVIL: EVIL}}
        for n in range(12)
    ]
    words = ARABIC.split()
    arabic = {"dense": ARABIC, f"small {EVIL}": " ".join(["لا"] * 5 + words[5:])}
    items += [{"key": f"r{n}", "language": "ar", "reference": ARABIC, "heard": arabic} for n in range(6)]
    talk = {model: f"{EVIL} said aloud" for model in heard}
    items.append({"key": "s", "reference": " ".join(f"o{n}" for n in range(300)), "heard": talk})
    items.append({"key": "f", "reason": EVIL})
    return write_run(folder, items, plan=EVIL)


@pytest.fixture(scope="module")
def found(run):
    return report(run, samples=50)


@pytest.fixture(scope="module")
def page(run, found):
    return (run.parent / "wild_report.html").read_text(encoding="utf-8")


def test_nothing_that_a_run_holds_becomes_part_of_the_page(page):
    parsed = Page(page)
    assert parsed.open == []
    assert not {"script", "img", "link", "iframe", "object", "form"} & set(parsed.tags)
    assert not [name for _, name, _ in parsed.attributes if name.startswith("on") or name == "src"]
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "\x1b" not in page and "\u202e" not in page


def test_the_page_loads_nothing_and_links_only_to_pages(page):
    links = {value for _, name, value in Page(page).attributes if name == "href"}
    assert {link for link in links if not link.startswith("#")} == {"https://example.org/?a=1&b=2"}
    for way in ("url(", "@import", "<style src", 'http-equiv="refresh"'):
        assert way not in page
    assert "default-src 'none'" in page and "width=device-width" in page and "prefers-color-scheme: dark" in page


def test_links_inside_the_page_lead_somewhere(page):
    attributes = Page(page).attributes
    places = {value for _, name, value in attributes if name == "id"}
    assert {value[1:] for _, name, value in attributes if name == "href" and value.startswith("#")} <= places


def test_arabic_reads_from_right_to_left(page):
    assert '<div class="words" dir="rtl">' in page and '<div class="words" dir="ltr">' in page
    assert "على" in page


def test_very_long_texts_are_cut(tmp_path):
    long = "word " * 60_000
    heard = {"dense": "word " * 3, "small": "x" * 300_000}
    run = write_run(
        tmp_path, [{"key": f"{n}", "language": "ab"[n % 2], "reference": "word", "heard": {}} for n in range(2)]
    )
    with sqlite3.connect(run) as database:
        database.execute("UPDATE item SET reference = ?, title = ?", (long, long))
        for item in (1, 2):
            for model, text in heard.items():
                database.execute(
                    "INSERT INTO result (item_id, model, status, wer, reference_normalised, hypothesis_normalised) "
                    "VALUES (?, ?, 'ok', ?, ?, ?)",
                    (item, model, float(model == "small"), long, text),
                )
    data = summarise(run, samples=50).data
    assert data["worst"] and len(render_page(data)) < 100_000


CARD = "---\nlicense: mit\n---\n\n# A model\n\n## Recipe\n\ntext\n\n## Limits\n\n- one\n"


def test_the_card_gets_the_section_once_before_its_limits(found, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "README.md").write_text(CARD, encoding="utf-8")
    for _ in range(2):
        text = write_section(model, found.data, {}).read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    part, _, after = rest.partition(END)
    assert before.startswith(CARD.partition("## Limits")[0].rstrip()) and after.lstrip() == "## Limits\n\n- one\n"
    assert text.count(BEGIN) == text.count(END) == text.count("## In the wild") == 1
    assert "### By language" in part and "12.6" not in before
    assert "<script>" not in part and "\x1b" not in part and "](" not in part
    assert [path.name for path in model.iterdir()] == ["README.md"]


def test_the_card_of_a_model_of_the_run_is_about_it_and_the_dense_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    heard = {"dense": ten_words(0), "half": ten_words(1), "tenth": ten_words(2)}
    run = write_run(tmp_path, [{"key": f"{n}", "reference": ten_words(0), "heard": heard} for n in range(6)])
    card = tmp_path / "runs" / "half" / "README.md"
    card.parent.mkdir(parents=True)
    card.write_text("# half\n")
    report(run, card=card.parent, samples=50)
    text = card.read_text()
    assert text.startswith("# half\n\n") and "| half |" in text and "| dense |" in text and "tenth" not in text


def test_a_section_of_which_half_is_there_is_not_replaced(tmp_path):
    for card in (f"a {BEGIN} b", f"a {END} b", f"{END} {BEGIN}"):
        with pytest.raises(CheckpointError, match="only one of the marks"):
            with_section(card, "new")


def test_a_folder_without_a_card_of_a_model_is_refused_before_anything_is_written(run, found, tmp_path):
    command = ["wild", "report", str(run), "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*command, "--card", str(tmp_path / "none")])
    assert done.exit_code == 2 and "none' is no folder of a model" in done.output
    assert not (tmp_path / "out").exists()
    (tmp_path / "model").mkdir()
    with pytest.raises(CheckpointError, match=r"no pruned model|config\.json"):
        write_section(tmp_path / "model", found.data, {})
    assert list((tmp_path / "model").iterdir()) == []


def test_the_command_prints_what_it_found_and_where_it_lies(run, tmp_path):
    done = CliRunner().invoke(app, ["wild", "report", str(run.parent), "--output", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    for words in ("20 items", "without suspect references", "language: ar", "saved to", "wild_report.html"):
        assert words in done.output
    assert "\x1b" not in done.output and (tmp_path / "out" / "wild_report.html").is_file()


def test_the_command_says_in_one_line_what_is_wrong(tmp_path):
    done = CliRunner().invoke(app, ["wild", "report", str(tmp_path / "none")])
    assert done.exit_code == 2 and done.output.strip().count("\n") == 0 and "does not exist" in done.output
