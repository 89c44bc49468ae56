"""Videos: which subtitles count, what is fetched, and why a video can't be had. yt-dlp's answers are made here."""

import errno
import io
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import yt_dlp
from yt_dlp.utils import DownloadError, ExtractorError, GeoRestrictedError

from hfprune.errors import DataError
from hfprune.speech.audio import read_audio
from hfprune.wild import run as running
from hfprune.wild import videos
from hfprune.wild.cache import Cache
from hfprune.wild.plan import Plan, PlanItem
from hfprune.wild.run import Settings, run
from hfprune.wild.videos import Unavailable, Videos
from tests.support.wild import recordings
from tests.wild.test_run import Spoken, rows_of

KEY = "aaaaaaaaaaa"
VTT = "WEBVTT\n\n00:00:00.000 --> 00:00:01.000\nThe quick\n\n00:00:01.000 --> 00:00:02.000\n<c>brown</c> fox\n"


def subtitles(*codes):
    return {code: [{"ext": "json3", "url": "x"}, {"ext": "vtt", "url": f"https://subtitles/{code}"}] for code in codes}


def info(key=KEY, **changes):
    return {
        "id": key,
        "duration": 10,
        "live_status": "not_live",
        "subtitles": subtitles("en"),
        "filesize": 40,
    } | changes


class Site:
    """Takes the place of yt-dlp's client: answers by a video's id, and writes what is downloaded."""

    def __init__(self):
        self.answers, self.asked, self.texts, self.sound = {}, [], {}, b"s" * 40

    def __call__(self, options):
        self.options = options
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def extract_info(self, address, download):
        key = address.removeprefix("https://www.youtube.com/watch?v=")
        self.asked.append((key, download))
        answer = self.answers[key]
        answer = answer.pop(0) if isinstance(answer, list) else answer
        if isinstance(answer, BaseException):
            raise answer
        if download:
            path = self.options["outtmpl"] % {"id": key, "ext": "wav"}
            with open(path, "wb") as file:
                file.write(self.sound)
        return answer

    def urlopen(self, url):
        return io.BytesIO(self.texts.get(url.rpartition("/")[2], VTT).encode())


@pytest.fixture
def site(monkeypatch):
    site = Site()
    monkeypatch.setattr(yt_dlp, "YoutubeDL", site)
    return site


def failed(error):
    """As yt-dlp hands on what an extractor raised."""
    return DownloadError(f"ERROR: {error}", (type(error), error, None))


def extractor(words, **more):
    return failed(ExtractorError(words, expected=True, video_id=KEY, ie="youtube", **more))


def test_only_what_people_wrote_is_a_reference(site):
    site.answers[KEY] = info(
        subtitles=subtitles("de", "en-US", "en-GB") | {"live_chat": [{"ext": "json"}]},
        automatic_captions=subtitles("en", "fr"),
        language="en-US",
    )
    video = Videos().look(KEY)
    assert (video.manual, video.generated) == (["de", "en-GB", "en-US"], ["en", "fr"])
    assert Videos().reference(video, "en") == ("The quick brown fox", "en-GB")
    assert Videos().reference(video, None)[1] == "en-US"
    assert site.asked == [(KEY, False)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"subtitles": {}}, "no human-made subtitles in 'en'"),
        (
            {"subtitles": {}, "automatic_captions": subtitles("en", "en-orig")},
            "no human-made subtitles in 'en'; only automatic captions",
        ),
        ({"subtitles": subtitles("fr", "de")}, "no human-made subtitles in 'en'; there are: de, fr"),
        ({"subtitles": {"en": [{"ext": "json3", "url": "x"}]}}, "neither vtt nor srt: json3"),
    ],
)
def test_videos_without_a_reference(site, changes, words):
    site.answers[KEY] = info(**changes)
    with pytest.raises(DataError) as raised:
        Videos().reference(Videos().look(KEY), "en")
    assert words in str(raised.value)


def test_subtitles_that_hold_nothing(site):
    site.answers[KEY] = info()
    site.texts["en"] = "WEBVTT\n\n"
    with pytest.raises(DataError, match="holds no text"):
        Videos().reference(Videos().look(KEY), "en")


COUNTRY = "The uploader has not made this video available in your country"


@pytest.mark.parametrize(
    ("answer", "words", "lasting"),
    [
        (extractor("Private video. Sign in if you've been granted access to this video"), "a private video: ", True),
        (extractor("Video unavailable. This video has been removed by the uploader"), "the video was removed: ", True),
        (extractor("Video unavailable. This video is no longer available"), "the video was removed: ", True),
        (failed(GeoRestrictedError(COUNTRY, countries=["DE"])), f"not available here: {COUNTRY}", True),
        (extractor("This live event will begin in 3 hours."), "a live stream: ", True),
        (info(live_status="is_live", is_live=True), "a live stream", True),
        (info(live_status="is_upcoming"), "a live stream", True),
        (extractor("Sign in to confirm your age"), "only for those logged in: ", True),
        (extractor("Unable to download API page: The read operation timed out"), "no answer in time: ", False),
        (TimeoutError("timed out"), "no answer in time: ", False),
        (extractor("Unable to download webpage: HTTP Error 429: Too Many Requests"), "no connection: ", False),
        (extractor("Unable to download webpage: HTTP Error 503: Service Unavailable"), "no connection: ", False),
        (extractor("Sign in to confirm you\u2019re not a bot"), "taken for a robot: ", False),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full: ", False),
        (None, "the video was removed", True),
    ],
)
def test_videos_that_cannot_be_had(site, answer, words, lasting):
    site.answers[KEY] = answer
    with pytest.raises(Unavailable) as raised:
        Videos().look(KEY)
    assert str(raised.value).startswith(words) and raised.value.lasting is lasting
    assert "ERROR" not in str(raised.value) and KEY not in str(raised.value) and "\n" not in str(raised.value)


def test_what_is_no_id_of_a_video_is_not_asked_for(site):
    with pytest.raises(DataError, match="is not the id of a video"):
        Videos().look("../../etc")
    assert site.asked == []


def test_the_sound_is_downloaded_once(site, tmp_path):
    site.answers[KEY] = info()
    cache = Cache(tmp_path, 100)
    for _ in range(2):
        path = Videos().sound(Videos().look(KEY), cache)
        assert path == tmp_path / "downloads" / f"{KEY}.wav" and path.stat().st_size == 40
        cache.let_go(KEY)
    assert [download for _, download in site.asked] == [False, True, False]


@pytest.fixture
def server(tmp_path):
    """An address on this machine where a recording lies."""
    (recordings(tmp_path / "site", a="x") / "a.wav").rename(tmp_path / "site" / f"{KEY}.wav")
    quiet = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    handler = partial(quiet, directory=tmp_path / "site")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_the_client_itself_downloads_into_the_cache_and_no_more_than_it_holds(server, tmp_path, monkeypatch):
    monkeypatch.setattr(videos, "address", lambda key: f"{server}{key}.wav")
    video = Videos().look(KEY)
    assert (video.manual, video.generated) == ([], [])
    path = Videos().sound(video, Cache(tmp_path, 100_000))
    assert path.name == f"{KEY}.wav" and len(read_audio(path)) == 8000
    with pytest.raises(DataError, match="nothing was downloaded: .* more than the cache holds"):
        Videos().sound(video, Cache(tmp_path / "small", 1_000))
    stopped = Videos()
    stopped.stop()
    with pytest.raises(DataError, match="stopped"):
        stopped.sound(video, Cache(tmp_path / "other", 100_000))
    monkeypatch.setattr(videos, "address", lambda key: f"{server}gone.wav")
    with pytest.raises(Unavailable, match="HTTP Error 404"):
        Videos().look(KEY)


def test_a_download_that_fails_leaves_nothing(site, tmp_path):
    site.answers[KEY] = [info(), OSError(errno.ENOSPC, "No space left on device")]
    cache = Cache(tmp_path, 100)
    (cache.folder / f"{KEY}.wav.part").write_bytes(b"half")
    video = Videos().look(KEY)
    with pytest.raises(Unavailable, match="the disk is full"):
        Videos().sound(video, cache)
    assert list(cache.folder.iterdir()) == []
    with pytest.raises(DataError, match="larger than the cache"):
        Videos().sound(video, Cache(tmp_path, 10))


def test_the_cache_is_bounded_and_touches_nothing_else(tmp_path):
    (tmp_path / "mine.wav").write_bytes(b"m" * 500)
    cache = Cache(tmp_path, 100)
    for key in ("a", "b", "c"):
        assert cache.hold(key, 40) is None
        (cache.folder / f"{key}.webm").write_bytes(b"x" * 40)
        cache.keep(key)
        cache.let_go(key)
    assert sorted(path.name for path in cache.folder.iterdir()) == ["b.webm", "c.webm"]
    assert cache.hold("b", 40) is not None
    cache.let_go("b", delete=True)
    assert [path.name for path in cache.folder.iterdir()] == ["c.webm"]
    with pytest.raises(DataError, match="nothing was downloaded"):
        cache.keep("d")
    cache.delete()
    assert [path.name for path in tmp_path.iterdir()] == ["mine.wav"]


def test_a_thread_that_waits_for_room_ends_when_the_cache_is_closed(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    cache = Cache(tmp_path, 100)
    cache.hold("a", 90)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(cache.hold, "b", 90)
        cache.close()
        with pytest.raises(DataError, match="stopped"):
            waiting.result()


def test_a_run_over_videos(site, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "Recogniser", type("Said", (Spoken,), {"said": "the quick brown fox", "heard": []}))
    site.sound = (recordings(tmp_path / "in", a="x") / "a.wav").read_bytes()
    keys = {name: name * 11 for name in "gprt"}
    site.answers = {
        keys["g"]: info(keys["g"]),
        keys["p"]: extractor("Private video. Sign in"),
        keys["r"]: info(keys["r"], subtitles={}, automatic_captions=subtitles("en")),
        keys["t"]: [info(keys["t"]), TimeoutError("timed out"), info(keys["t"]), info(keys["t"])],
    }
    items = [PlanItem(key=key, video_id=key, category="News") for key in keys.values()]
    items.append(PlanItem(key="l" * 11, reason="a live stream"))
    Plan(source="youtube", args={"relevanceLanguage": "en"}, items=items).write(tmp_path / "plan.json")
    run(tmp_path / "plan.json", ["m"], tmp_path / "out", Settings(delete_cache=True))
    found, results = rows_of(tmp_path / "out")
    assert found[keys["g"]]["status"] == "ok" and found[keys["g"]]["reference_language"] == "en"
    assert found[keys["g"]]["url"] == f"https://www.youtube.com/watch?v={keys['g']}"
    assert found[keys["p"]]["reason"].startswith("a private video")
    assert found[keys["r"]]["reason"].endswith("only automatic captions")
    assert found[keys["t"]]["reason"].startswith("no answer in time")
    assert found["l" * 11]["reason"] == "a live stream"
    assert [row["wer"] for row in results] == [0]
    assert not (tmp_path / "out" / "cache" / "downloads").exists()
    assert {key for key, _ in site.asked} == set(keys.values())
    del site.answers[keys["p"]], site.answers[keys["r"]]
    site.answers |= {keys["p"]: extractor("Private video"), keys["r"]: info(keys["r"]), "l" * 11: info(is_live=True)}
    run(tmp_path / "plan.json", ["m"], tmp_path / "out", Settings(retry=True))
    found, results = rows_of(tmp_path / "out")
    assert len(results) == 3 and found[keys["t"]]["status"] == "ok" and found["l" * 11]["reason"] == "a live stream"
    assert len(list((tmp_path / "out" / "cache" / "downloads").iterdir())) == 2
