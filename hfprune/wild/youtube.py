"""A plan from YouTube: videos that its Data API finds, of which those with human-made subtitles can be tested."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hfprune.errors import ConfigError, DataError, NotReachable
from hfprune.registry import did_you_mean
from hfprune.speech.captions import choose_language
from hfprune.speech.needs import needed
from hfprune.wild.plan import Plan, PlanItem
from hfprune.wild.videos import Unavailable, Videos, no_subtitles

KEY = "YOUTUBE_API_KEY"
"""The environment variable that holds the key of the YouTube Data API; it is written nowhere."""

_SPENT = ("quotaExceeded", "dailyLimitExceeded", "rateLimitExceeded", "userRateLimitExceeded")


class QuotaSpent(NotReachable):
    """The Data API answers no more today."""


@dataclass(frozen=True)
class Search:
    """What is looked for.

    Attributes:
        category: of the videos: its title, as the region has it (`Education`), or its number.
        query: words; by default the category's title.
        language: of the speech and the subtitles.
        region: ISO 3166 code of the country whose viewers are asked for.
        duration: `short` (below 4 minutes), `medium`, `long` (above 20) or `any`.
        licence: `creativeCommon`, `youtube` or `any`.
        results: videos a page, at most 50.
        iterations: pages; each costs 101 units of the daily quota.
        page_token: where an earlier search ended (`nextPageToken` of its plan).
    """

    category: str | None = None
    query: str | None = None
    language: str = "en"
    region: str = "US"
    duration: str = "medium"
    licence: str = "creativeCommon"
    results: int = 10
    iterations: int = 1
    page_token: str | None = None

    def arguments(self, titles: dict[str, str]) -> dict[str, Any]:
        """As the Data API takes it, given the titles of categories by their number."""
        number = None if self.category is None else _category(titles, self.category, self.region)
        found = {
            "maxResults": self.results,
            "q": self.query or titles.get(number or ""),
            "regionCode": self.region,
            "relevanceLanguage": self.language,
            "videoCategoryId": number,
            "videoDuration": self.duration,
            "videoLicense": self.licence,
        }
        return {key: value for key, value in found.items() if value is not None}


def plan_youtube(
    search: Search,
    name: str | None = None,
    *,
    service: Any = None,
    videos: Videos | None = None,
    tell: Callable[[str], None] | None = None,
) -> Plan:
    """A plan of videos with subtitles, found page by page.

    What was found before the quota was spent, or the connection lost, is kept. A video whose subtitles people did not
    make, or that can't be watched, stays in the plan with the reason.

    Args:
        search: what is looked for.
        name: of the plan.
        service: the client of the Data API; by default made with the key in YOUTUBE_API_KEY.
        videos: what tells the subtitles of a video.
        tell: is given a line where the search ended early.

    Raises:
        ConfigError: no key, or an unknown category.
        NotReachable: nothing was found before YouTube refused or could not be reached.
        DataError: nothing was found that can be tested.
    """
    service = service if service is not None else connect()
    videos = videos if videos is not None else Videos()
    titles = _categories(service, search.region)
    args = search.arguments(titles)
    items: dict[str, PlanItem] = {}
    token = search.page_token
    for _ in range(search.iterations):
        try:
            found, after = _page(service, args | ({"pageToken": token} if token else {}), titles)
        except NotReachable as error:
            if not items:
                raise
            if tell is not None:
                tell(f"{error}; what was found until then ({len(items)}) is kept")
            break
        for item in found:
            if item.key not in items:
                items[item.key] = item
                _see_subtitles(item, videos, search.language)
        token = after
        if token is None:
            break
    asked = {"iterations": search.iterations} | ({"pageToken": search.page_token} if search.page_token else {})
    return Plan(
        name=name or f"{args.get('q') or 'youtube'} ({search.language})",
        source="youtube",
        args=args | asked,
        items=list(items.values()),
        next_page_token=token,
        region_code=search.region,
        video_category_id=args.get("videoCategoryId"),
    ).require_items()


def connect(http: Any = None) -> Any:
    """The official client of the Data API, from the description of the API that its package ships.

    Args:
        http: what sends requests; by default the client's own.

    Raises:
        ConfigError: no key in YOUTUBE_API_KEY.
    """
    key = os.environ.get(KEY, "").strip()
    if not key:
        raise ConfigError(f"no key of the YouTube Data API: put one into the environment variable {KEY}")
    build = needed("googleapiclient.discovery").build
    return build("youtube", "v3", developerKey=key, http=http, cache_discovery=False, static_discovery=True)


def _ask(request: Any) -> dict[str, Any]:
    """An answer of the Data API; its errors as one line, without the address, which holds the key."""
    errors = needed("googleapiclient.errors")
    transport = needed("httplib2")
    try:
        answer = request.execute()
    except errors.HttpError as error:
        details = error.error_details if isinstance(error.error_details, list) else []
        reasons = {detail.get("reason") for detail in details if isinstance(detail, dict)}
        said = " ".join(str(error.reason).split()).replace(os.environ.get(KEY, "").strip() or "\0", "...")
        if reasons & set(_SPENT):
            line = "the quota of the YouTube Data API is spent (it is renewed at midnight, Pacific Time)"
            raise QuotaSpent(line) from None
        raise NotReachable(f"YouTube refused ({error.resp.status}): {said}") from None
    except TimeoutError:
        raise NotReachable("YouTube did not answer in time") from None
    except (OSError, transport.HttpLib2Error) as error:
        raise NotReachable(f"YouTube can't be reached ({type(error).__name__})") from None
    if not isinstance(answer, dict):  # the client gives what is no JSON as it came
        raise NotReachable("something else than YouTube answered: no JSON")
    return answer


def _categories(service: Any, region: str) -> dict[str, str]:
    """The titles of categories by their number."""
    answer = _ask(service.videoCategories().list(part="snippet", regionCode=region))
    found = answer.get("items", [])
    return {item["id"]: item["snippet"]["title"] for item in found if item["snippet"].get("assignable", True)}


def _category(titles: dict[str, str], said: str, region: str) -> str:
    by_title = {title.casefold(): number for number, title in titles.items()}
    if said in titles:
        return said
    if said.casefold() in by_title:
        return by_title[said.casefold()]
    raise ConfigError(f"--category: no '{said}' in {region}; {did_you_mean(said, titles.values())}")


def _page(service: Any, args: dict[str, Any], titles: dict[str, str]) -> tuple[list[PlanItem], str | None]:
    """The videos of a page of the search, and the token of the next one."""
    answer = _ask(service.search().list(part="snippet", type="video", videoCaption="closedCaption", **args))
    found = [item["id"]["videoId"] for item in answer.get("items", []) if "videoId" in item.get("id", {})]
    details: dict[str, Any] = {}
    if found:
        more = _ask(service.videos().list(part="contentDetails,snippet,status", id=",".join(found)))
        details = {item["id"]: item for item in more.get("items", [])}
    items = [_item(video, details.get(video), args, titles) for video in found]
    return items, answer.get("nextPageToken")


def _item(video: str, details: dict[str, Any] | None, args: dict[str, Any], titles: dict[str, str]) -> PlanItem:
    if details is None:
        return PlanItem(key=video, video_id=video, reason="the video was removed")
    snippet = details["snippet"]
    number = snippet.get("categoryId") or args.get("videoCategoryId")
    live = snippet.get("liveBroadcastContent", "none") != "none"
    return PlanItem(
        key=video,
        video_id=video,
        title=snippet.get("title"),
        channel_id=snippet.get("channelId"),
        channel_title=snippet.get("channelTitle"),
        publish_time=snippet.get("publishedAt"),
        category=titles.get(number, number),
        region=args["regionCode"],
        licence=details.get("status", {}).get("license"),
        duration=None if live else details.get("contentDetails", {}).get("duration"),
        default_audio_language=snippet.get("defaultAudioLanguage"),
        reason="a live stream" if live else None,
    )


def _see_subtitles(item: PlanItem, videos: Videos, language: str) -> None:
    """Notes which subtitles a video has; one that did not answer in time is left for the run to ask again."""
    if item.reason is not None:
        return
    try:
        seen = videos.look(item.key)
    except Unavailable as error:
        item.reason = str(error) if error.lasting else None
    except DataError as error:
        item.reason = str(error)
    else:
        item.manually_created_transcripts, item.generated_transcripts = seen.manual, seen.generated
        if choose_language(seen.manual, language) is None:
            item.reason = no_subtitles(seen, language)
