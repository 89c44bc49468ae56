"""The YouTube Data API, as its official client hears it: answers in its own format, made here."""

import json
import urllib.parse

import httplib2
import pytest
from googleapiclient.http import HttpMockSequence

from hfprune.errors import ConfigError, DataError, NotReachable
from hfprune.wild.videos import Unavailable, Video
from hfprune.wild.youtube import KEY, QuotaSpent, Search, connect, plan_youtube

SECRET = "AIza-a-secret-key"
OK = {"status": "200"}
CATEGORIES = {
    "items": [
        {"id": "27", "snippet": {"title": "Education", "assignable": True}},
        {"id": "18", "snippet": {"title": "Short Movies", "assignable": False}},
    ]
}


def answer(values, status="200"):
    return {"status": status, "content-type": "application/json"}, json.dumps(values)


def error(status, reason, message):
    details = [{"message": message, "domain": "youtube.quota", "reason": reason}]
    return answer({"error": {"code": int(status), "message": message, "errors": details}}, status)


def searched(*keys, after=None):
    items = [{"id": {"kind": "youtube#video", "videoId": key}, "snippet": {"title": "A &amp; B"}} for key in keys]
    return answer({"kind": "youtube#searchListResponse", "items": items} | ({"nextPageToken": after} if after else {}))


def detailed(*keys, **snippet):
    common = {"title": "A & B", "categoryId": "27", "publishedAt": "2020-01-01T00:00:00Z", "channelTitle": "C"}
    return answer(
        {
            "items": [
                {
                    "id": key,
                    "snippet": common | {"liveBroadcastContent": "none", "defaultAudioLanguage": "en"} | snippet,
                    "contentDetails": {"duration": "PT6M30S", "caption": "true"},
                    "status": {"license": "creativeCommon"},
                }
                for key in keys
            ]
        }
    )


class Subtitles:
    """Tells the subtitles of videos without asking anyone."""

    def __init__(self, **answers):
        self.answers = answers

    def look(self, key):
        found = self.answers.get(key, ["en"])
        if isinstance(found, Exception):
            raise found
        return Video(key, found, ["en"], "en", 1, {})


@pytest.fixture
def planning(monkeypatch):
    """Plans from a sequence of answers; gives the plan and the requests."""
    monkeypatch.setenv(KEY, SECRET)

    def make(*answers, subtitles=None, tell=None, **search):
        http = HttpMockSequence([answer(CATEGORIES), *answers])
        make.requests = http.request_sequence
        return plan_youtube(Search(**search), service=connect(http), videos=subtitles or Subtitles(), tell=tell)

    return make


def asked(request):
    return {name: values[0] for name, values in urllib.parse.parse_qs(urllib.parse.urlsplit(request[0]).query).items()}


def test_pages_of_a_search_become_a_plan(planning, tmp_path):
    pages = [searched("a" * 11, "b" * 11, after="T2"), detailed("a" * 11, "b" * 11), searched("c" * 11, after="T3")]
    plan = planning(*pages, detailed("c" * 11), category="education", iterations=2, results=2, language="en")
    assert [item.key for item in plan.testable] == ["a" * 11, "b" * 11, "c" * 11]
    first = plan.items[0]
    assert (first.title, first.category, first.licence, first.region) == ("A & B", "Education", "creativeCommon", "US")
    assert first.duration.total_seconds() == 390 and first.manually_created_transcripts == ["en"]
    assert plan.next_page_token == "T3" and plan.video_category_id == "27"
    _, search, details, second, _ = map(asked, planning.requests)
    assert search["videoCaption"] == "closedCaption" and search["type"] == "video" and search["q"] == "Education"
    assert search["videoCategoryId"] == "27" and search["videoDuration"] == "medium" and search["maxResults"] == "2"
    assert search["videoLicense"] == "creativeCommon" and "pageToken" not in search
    assert details["id"] == f"{'a' * 11},{'b' * 11}" and second["pageToken"] == "T2"
    plan.write(tmp_path / "plan.json")
    assert SECRET not in (tmp_path / "plan.json").read_text()


def test_videos_that_cannot_be_tested_stay_with_the_reason(planning):
    keys = [letter * 11 for letter in "abcdef"]
    subtitles = Subtitles(
        **{
            keys[1]: [],
            keys[2]: Unavailable("a private video"),
            keys[3]: Unavailable("no answer in time", lasting=False),
            keys[4]: ["fr"],
        }
    )
    plan = planning(searched(*keys), detailed(*keys[:5]), subtitles=subtitles, query="x")
    assert [item.key for item in plan.testable] == [keys[0], keys[3]]
    assert [item.reason for item in plan.items] == [
        None,
        "no human-made subtitles in 'en'; only automatic captions",
        "a private video",
        None,
        "no human-made subtitles in 'en'; there are: fr",
        "the video was removed",
    ]


def test_live_streams_stay_with_the_reason(planning):
    plan = (searched("a" * 11, "b" * 11), detailed("a" * 11, "b" * 11, liveBroadcastContent="live"))
    with pytest.raises(DataError, match="none of the 2 items can be tested: a live stream"):
        planning(*plan, query="x")


def test_what_was_found_before_the_quota_ended_is_kept(planning):
    told = []
    spent = error("403", "quotaExceeded", "The request cannot be completed because you have exceeded your quota.")
    answers = [searched("a" * 11, after="T2"), detailed("a" * 11), spent]
    plan = planning(*answers, query="x", iterations=3, tell=told.append)
    assert [item.key for item in plan.items] == ["a" * 11] and plan.next_page_token == "T2"
    assert "quota of the YouTube Data API is spent" in told[0] and "what was found until then (1) is kept" in told[0]
    with pytest.raises(QuotaSpent, match="quota"):
        planning(spent, query="x")


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        (
            [error("400", "badRequest", f"API key not valid: {SECRET}. Please pass a valid API key.")],
            "API key not valid",
        ),
        ([error("403", "accessNotConfigured", "YouTube Data API v3 has not been used")], "refused .403.: YouTube"),
        ([({"status": "500"}, "oops")], "refused .500."),
        ([({"status": "200"}, "<html>log in to this network</html>")], "something else than YouTube answered"),
    ],
)
def test_refusals_are_one_line_without_the_key(planning, answers, words):
    with pytest.raises(NotReachable, match=words) as raised:
        planning(*answers, query="x")
    assert SECRET not in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (TimeoutError("timed out"), "did not answer in time"),
        (httplib2.ServerNotFoundError("no server"), "can't be reached"),
        (ConnectionRefusedError(), "can't be reached"),
    ],
)
def test_no_connection_is_one_line(monkeypatch, problem, words):
    monkeypatch.setenv(KEY, SECRET)

    class Silent:
        def request(self, *_, **__):
            raise problem

    with pytest.raises(NotReachable, match=words):
        plan_youtube(Search(query="x"), service=connect(Silent()))


def test_no_key_nothing_found_and_unknown_categories_are_one_line(planning, monkeypatch):
    with pytest.raises(DataError, match="nothing was found"):
        planning(searched(), query="x")
    with pytest.raises(ConfigError, match="--category: no 'Educatoin' in US; did you mean 'Education'"):
        planning(category="Educatoin")
    monkeypatch.delenv(KEY)
    with pytest.raises(ConfigError, match="YOUTUBE_API_KEY"):
        plan_youtube(Search(query="x"))
