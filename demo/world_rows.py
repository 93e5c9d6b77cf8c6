"""Generates the rows of one LAION part: the scene, flaw and web pages of each.

Alt text comes from `demo.laion_rows`, server behaviours from `demo.web_pages`; `demo.world` writes the files.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from demo.laion_rows import draw_licence, draw_path, draw_text
from demo.scenes import Scene, caption, render, sample_scene
from demo.web_pages import (
    BEHAVIOURS,
    CONTENT_TYPES,
    HTML_PAGE,
    ROBOT_HEADERS,
    SUFFIXES,
    Page,
    PageKind,
    animation,
    encode,
    encode_unusually,
    pixel_bomb,
)

FLAWS: Mapping[str, float] = MappingProxyType(
    {
        "similarity_low": 70,
        "similarity_missing": 5,
        "nsfw": 45,
        "nsfw_missing": 7,
        "too_small": 28,
        "aspect_extreme": 14,
        "size_missing": 5,
        "text_empty": 8,
        "text_too_short": 7,
        "text_too_long": 5,
        "duplicate_pair": 10,
        "duplicate_url": 10,
        "url_missing": 3,
        "url_not_http": 3,
    }
)
"""Flaws for which the demo's filters drop a row -> rows per 1000."""

_SIZES_PX = (256, 288, 320, 384, 448)
_SIDES = ((1.0, 0.62), (4 / 3, 0.14), (3 / 2, 0.10), (3 / 4, 0.08), (2 / 3, 0.06))
_FORMATS = (("JPEG", 0.74), ("PNG", 0.13), ("WEBP", 0.13))
# A smaller part contains flaws and behaviours only in proportion; a larger one contains each at least once.
_MIN_ROWS_FOR_ALL = 100


@dataclass(kw_only=True)
class Site:
    """The pages of the small web during the build; bodies are appended to the pack."""

    pack: BinaryIO
    origin: str
    """Scheme, host and port of every page."""
    pages: dict[str, Page] = field(default_factory=dict)

    def url(self, path: str) -> str:
        return self.origin + path

    def _store(self, body: bytes) -> tuple[int, int]:
        offset = self.pack.tell()
        self.pack.write(body)
        return offset, len(body)

    def add_body(self, path: str, body: bytes, content_type: str, **changes: Any) -> None:
        offset, num_bytes = self._store(body)
        headers = {"Content-Type": content_type, **changes.pop("headers", {})}
        self.pages[path] = Page(offset=offset, num_bytes=num_bytes, headers=headers, **changes)

    def add_html(self, path: str, title: str, **changes: Any) -> None:
        content_type = changes.pop("content_type", "text/html; charset=utf-8")
        self.add_body(path, HTML_PAGE.format(title=title).encode(), content_type, **changes)

    def add_redirect(self, path: str, location: str, status: int = 302) -> None:
        self.pages[path] = Page(kind=PageKind.REDIRECT, status=status, headers={"Location": location})


class PartBuilder:
    """Builds the rows of one part and their pages."""

    def __init__(self, site: Site, seed: int, part: str, num_rows: int) -> None:
        self._site = site
        self._part = part
        self._seed = seed
        self._num_rows = num_rows
        self._fine: list[tuple[dict[str, Any], dict[str, Any]]] = []
        """LAION rows and truth rows so far without flaw or misbehaviour, as originals of duplicates and copies."""

    def build(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Return LAION rows and truth rows."""
        laion_rows, truth_rows = [], []
        for row, (flaw, behaviour) in enumerate(self._plan()):
            laion, truth = self._row(row, flaw, behaviour)
            laion_rows.append(laion)
            truth_rows.append(truth)
            if flaw is None and behaviour == "fine":
                self._fine.append((laion, truth))
        return laion_rows, truth_rows

    def _plan(self) -> Iterator[tuple[str | None, str]]:
        """Yield (flaw, behaviour) for each row in random order, after two rows without either."""
        at_least = 1 if self._num_rows >= _MIN_ROWS_FOR_ALL else 0
        flaws = _shares(FLAWS, self._num_rows, at_least)
        behaviours = _shares(
            {k: b.weight for k, b in BEHAVIOURS.items() if b.weight}, self._num_rows - len(flaws), at_least
        )
        plan: list[tuple[str | None, str]] = [(flaw, "fine") for flaw in flaws]
        plan += [(None, behaviour) for behaviour in behaviours]
        num_fine = self._num_rows - len(plan)
        rng = np.random.default_rng((self._seed, int(self._part), 1))
        first, rest = [(None, "fine")] * min(2, num_fine), plan + [(None, "fine")] * max(0, num_fine - 2)
        yield from first
        yield from (rest[i] for i in rng.permutation(len(rest)))

    def _row(self, row: int, flaw: str | None, behaviour: str) -> tuple[dict[str, Any], dict[str, Any]]:
        rng = np.random.default_rng((self._seed, int(self._part), 2, row))
        scene = sample_scene(rng)
        text, similarity = draw_text(scene, rng)
        image = _framed(scene, rng)
        url, copied = self._publish_row(row, scene, image, behaviour, rng)
        laion: dict[str, Any] = {
            "SAMPLE_ID": float(rng.integers(10**9, 5 * 10**12)),
            "URL": url,
            "TEXT": text,
            "HEIGHT": image.height,
            "WIDTH": image.width,
            "LICENSE": draw_licence(rng),
            "NSFW": "UNLIKELY",
            "similarity": similarity,
        }
        if flaw is None and rng.random() < 0.05:  # the image was replaced after the crawl
            laion["HEIGHT"], laion["WIDTH"] = 2 * image.height, 2 * image.width
        if flaw is not None:
            copied = self._apply_flaw(laion, flaw, rng) or copied
        shown = copied or {"caption": caption(scene), "scene": json.dumps(asdict(scene), sort_keys=True)}
        truth = {
            "url": laion["URL"],
            "part": self._part,
            "row": row,
            "flaw": flaw,
            "behaviour": behaviour,
            "outcome": BEHAVIOURS[behaviour].outcome.value,
            "copy_of": copied["url"] if copied else None,
            "caption": shown["caption"],
            "scene": shown["scene"],
        }
        return laion, truth

    def _apply_flaw(self, laion: dict[str, Any], flaw: str, rng: np.random.Generator) -> dict[str, Any] | None:
        """Apply a flaw to a row; return the truth row of a repeated URL, or None."""
        match flaw:
            case "similarity_low":
                laion["similarity"] = round(float(rng.uniform(0.17, 0.279)), 9)
            case "similarity_missing":
                laion["similarity"] = None
            case "nsfw":
                laion["NSFW"] = "UNSURE" if rng.random() < 0.7 else "NSFW"
            case "nsfw_missing":
                laion["NSFW"] = None
            case "too_small":
                laion["WIDTH"], laion["HEIGHT"] = int(rng.integers(1, 63)), int(rng.integers(20, 80))
            case "aspect_extreme":
                laion["WIDTH"], laion["HEIGHT"] = int(rng.integers(728, 1200)), int(rng.integers(70, 200))
            case "size_missing":
                laion["WIDTH"] = laion["HEIGHT"] = None
            case "text_empty":
                laion["TEXT"] = (None, "", "   ")[rng.integers(3)]
            case "text_too_short":
                laion["TEXT"] = ("a", "hi", "1", "…")[rng.integers(4)]
            case "text_too_long":
                laion["TEXT"] = " ".join([laion["TEXT"]] * (1 + 1200 // len(laion["TEXT"])))
            case "url_missing":
                laion["URL"] = None
            case "url_not_http":
                laion["URL"] = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
            case "duplicate_pair" | "duplicate_url":
                original, truth = self._fine[rng.integers(len(self._fine))]
                laion |= {name: original[name] for name in ("URL", "HEIGHT", "WIDTH")}
                laion["TEXT"] = original["TEXT"] if flaw == "duplicate_pair" else f"{original['TEXT']} (2)"
                return truth
        return None

    def _publish_row(
        self, row: int, scene: Scene, image: Image.Image, behaviour: str, rng: np.random.Generator
    ) -> tuple[str, dict[str, Any] | None]:
        """Publish the pages of a row; return its URL, and the truth row of repeated bytes, or None."""
        body, format_name = _body(image, behaviour, rng)
        number = f"{int(rng.integers(1000, 10_000))}{int(self._part):02d}{row:05d}"
        path = "/" + draw_path(scene, rng, SUFFIXES[format_name]).format(number=number)
        content_type = CONTENT_TYPES[format_name]
        site, aside = self._site, f"/moved/{number}"
        match behaviour:
            case "copy":
                original, truth = self._fine[rng.integers(len(self._fine))]
                site.pages[path] = site.pages[original["URL"].removeprefix(site.origin)]
                return site.url(path), truth
            case "private_address":
                return f"http://10.0.0.{int(rng.integers(1, 255))}{path}", None
            case "not_found" | "gone" | "forbidden" | "server_error":
                status = {"not_found": 404, "gone": 410, "forbidden": 403, "server_error": 500}[behaviour]
                site.add_html(path, f"Error {status}", status=status)
            case "fails_once" | "fails_twice":
                times = 1 if behaviour == "fails_once" else 2
                site.add_body(path, body, content_type, kind=PageKind.FAIL_THEN_BODY, status=503, num_failures=times)
            case "throttled":
                headers = {"Retry-After": "1"}
                kind = PageKind.FAIL_THEN_BODY
                site.add_body(path, body, content_type, kind=kind, status=429, num_failures=1, headers=headers)
            case "stall" | "drip" | "slow" | "disconnect" | "short_body" | "oversized":
                site.add_body(path, body, content_type, kind=PageKind(behaviour))
            case "html_as_image":
                site.add_html(path, "Image gallery", content_type=content_type)
            case "redirect":
                site.add_redirect(path, aside, status=int(rng.choice([301, 302, 303, 307, 308])))
                site.add_body(aside, body, content_type)
            case "redirect_chain":
                hops = [path, f"{aside}/1", f"{aside}/2", f"{aside}/3"]
                for hop, target in pairwise(hops):
                    site.add_redirect(hop, site.url(target))
                site.add_body(hops[-1], body, content_type)
            case "redirect_endless":
                hops = [path] + [f"{aside}/{hop}" for hop in range(25)]
                for hop, target in pairwise(hops):
                    site.add_redirect(hop, target)
                site.add_body(hops[-1], body, content_type)
            case "redirect_loop":
                site.add_redirect(path, aside)
                site.add_redirect(aside, path)
            case "redirect_to_html":
                site.add_redirect(path, aside)
                site.add_html(aside, "Sign in to continue")
            case "redirect_private":
                site.add_redirect(path, "http://10.0.0.1/admin.jpg")
            case "redirect_metadata":
                site.add_redirect(path, "http://169.254.169.254/latest/meta-data/")
            case "redirect_scheme":
                site.add_redirect(path, "file:///etc/passwd")
            case "wrong_type":
                wrong = rng.choice(["text/plain", "application/octet-stream", "text/html", "image/jpg"])
                site.add_body(path, body, str(wrong))
            case _ if behaviour in ROBOT_HEADERS:
                site.add_body(path, body, content_type, headers={"X-Robots-Tag": ROBOT_HEADERS[behaviour]})
            case _:
                site.add_body(path, body, content_type)
        return site.url(path), None


def _shares(weights: Mapping[str, float], num_rows: int, at_least: int) -> list[str]:
    """Return each name as often as its weight per 1000 rows requires."""
    return [name for name, w in weights.items() for _ in range(max(at_least, round(w * num_rows / 1000)))]


def _framed(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """Return the scene at a random size and aspect ratio, with the scene itself in the central square."""
    size_px = _SIZES_PX[rng.integers(len(_SIZES_PX))]
    aspect = _SIDES[rng.choice(len(_SIDES), p=[share for _, share in _SIDES])][0]
    image = render(scene, size_px=size_px)
    if aspect == 1.0:
        return image
    margin = round(size_px * (max(aspect, 1 / aspect) - 1) / 2)
    sides = ((0, 0), (margin, margin)) if aspect > 1 else ((margin, margin), (0, 0))
    # Mirrored edges extend the background; the pipeline's centre crop removes them.
    return Image.fromarray(np.pad(np.asarray(image), (*sides, (0, 0)), mode="reflect"))


def _body(image: Image.Image, behaviour: str, rng: np.random.Generator) -> tuple[bytes, str]:
    """Return the bytes that a behaviour serves, and their nominal format."""
    format_name = _FORMATS[rng.choice(len(_FORMATS), p=[share for _, share in _FORMATS])][0]
    match behaviour:
        case "cmyk" | "palette" | "sixteen_bit" | "alpha" | "exif_rotated":
            return encode_unusually(image, behaviour)
        case "animated_gif" | "animated_webp":
            name = behaviour.removeprefix("animated_").upper()
            return animation(image, name), name
        case "truncated":
            body = encode(image, "JPEG", rng)
            return body[: len(body) * 3 // 5], "JPEG"
        case "empty_body":
            return b"", "JPEG"
        case "svg":
            return b'<svg xmlns="http://www.w3.org/2000/svg" width="320" height="240"><rect/></svg>', "SVG"
        case "pixel_bomb":
            return pixel_bomb(), "PNG"
        case "tiny":
            return encode(image.resize((1, 1) if rng.random() < 0.5 else (40, 30)), "GIF", rng), "GIF"
        case "extreme_aspect":
            return encode(image.resize((1200, 150)), "JPEG", rng), "JPEG"
        case _:
            return encode(image, format_name, rng), format_name
