"""Generates the fields of LAION rows: messy alt text, similarity, licences, URL paths.

`demo.world_rows` chooses a row's scene and server behaviour.
"""

import html
from collections.abc import Callable
from types import MappingProxyType

import numpy as np

from demo.scenes import Scene, list_phrase

_SHOPS = ("Craftnest", "Redbarrel", "Homeway", "Bidbarn", "Zestle", "MugMart", "Shirtspread", "Galleria24")
_SITES = (
    "cdn.shop-bright.example",
    "i.pinimages.example",
    "images.fineprints.example",
    "static.recipeblog.example",
    "thumbs.stockdreams.example",
    "upload.photowall.example",
    "img.forumhost.example",
    "media.newsdesk.example",
    "www.kinderbasteln.example",
    "bilder.flohmarkt.example",
)
_FOLDERS = ("uploads", "wp-content/uploads/2018/05", "images", "products", "media/catalog/product", "originals", "img")
_CAMERAS = ("IMG", "DSC", "DSCN", "P", "SAM", "Screenshot")
_EMOJI = ("😍", "❤️", "🔥", "✨", "👌", "🎉", "🌈")
_MONTHS = ("January", "March", "May", "August", "October", "December")

_NOUNS_ELSEWHERE = MappingProxyType(
    {
        "apple": ("Apfel", "pomme", "manzana", "яблоко", "りんご"),
        "bell": ("Glocke", "cloche", "campana", "колокольчик", "ベル"),
        "book": ("Buch", "livre", "libro", "книга", "本"),
        "boot": ("Stiefel", "botte", "bota", "сапог", "ブーツ"),
        "butterfly": ("Schmetterling", "papillon", "mariposa", "бабочка", "蝶"),
        "car": ("Auto", "voiture", "coche", "машина", "車"),
        "cat": ("Katze", "chat", "gato", "кошка", "猫"),
        "chair": ("Stuhl", "chaise", "silla", "стул", "椅子"),
        "crown": ("Krone", "couronne", "corona", "корона", "王冠"),
        "fish": ("Fisch", "poisson", "pez", "рыба", "魚"),
        "hat": ("Hut", "chapeau", "sombrero", "шляпа", "帽子"),
        "heart": ("Herz", "cœur", "corazón", "сердце", "ハート"),
        "house": ("Haus", "maison", "casa", "дом", "家"),
        "moon": ("Mond", "lune", "luna", "луна", "月"),
        "star": ("Stern", "étoile", "estrella", "звезда", "星"),
        "umbrella": ("Regenschirm", "parapluie", "paraguas", "зонт", "傘"),
    }
)
_FRAMES_ELSEWHERE = (
    "{} kaufen – große Auswahl ab 9,99 €",
    "Illustration vectorielle {} - image libre de droits",
    "Dibujo de {} para niños",
    "{} купить в интернет-магазине",
    "{}のイラスト素材 [{number}]",
)


def _first_group(scene: Scene) -> tuple[str, str]:
    return next(iter(scene.groups()))


def _plain(scene: Scene, rng: np.random.Generator) -> str:
    phrases = [f"{colour} {noun}" for colour, noun in scene.groups()]
    return list_phrase(phrases).capitalize() + ("." if rng.random() < 0.3 else "")


def _shop(scene: Scene, rng: np.random.Generator) -> str:
    colour, noun = _first_group(scene)
    frame = rng.choice(
        [
            "{c} {n} T-Shirt for Kids | Free Shipping - {shop}",
            "Buy {c} {n} Online at Best Price - {shop}",
            "{c} {n} - Set of {k} - {shop}",
            "Personalized {c} {n} Ornament, Gift Idea {year}",
        ]
    )
    return frame.format(
        c=colour.title(),
        n=noun.title(),
        shop=_SHOPS[rng.integers(len(_SHOPS))],
        k=int(rng.integers(2, 13)),
        year=int(rng.integers(2009, 2022)),
    )


def _stock(scene: Scene, rng: np.random.Generator) -> str:
    colour, noun = _first_group(scene)
    return f"{noun} {colour} vector illustration {scene.background} background. Stock Vector - {_number(rng)}"


def _file_name(scene: Scene, rng: np.random.Generator) -> str:
    camera = _CAMERAS[rng.integers(len(_CAMERAS))]
    return f"{camera}_{_number(rng)}{rng.choice(['.jpg', '.JPG', '', '-1024x768', ' (2)'])}"


def _slug(scene: Scene, rng: np.random.Generator) -> str:
    colour, noun = _first_group(scene)
    return f"{colour}-{noun}-{scene.background}-{int(rng.integers(1, 99)):02d}"


def _emoji(scene: Scene, rng: np.random.Generator) -> str:
    noun = _first_group(scene)[1]
    return f"{_EMOJI[rng.integers(len(_EMOJI))]} cute {noun} {_EMOJI[rng.integers(len(_EMOJI))]}"


def _entities(scene: Scene, rng: np.random.Generator) -> str:
    colour, noun = _first_group(scene)
    return html.escape(f'"{colour.title()} {noun.title()}" Art Print & Poster by Anna\'s Studio')


def _elsewhere(scene: Scene, rng: np.random.Generator) -> str:
    noun = _first_group(scene)[1]
    names = _NOUNS_ELSEWHERE.get(noun, (noun,) * len(_FRAMES_ELSEWHERE))
    language = int(rng.integers(len(_FRAMES_ELSEWHERE)))
    return _FRAMES_ELSEWHERE[language].format(names[language], number=_number(rng))


def _shouting(scene: Scene, rng: np.random.Generator) -> str:
    return f"{_plain(scene, rng).upper()}  !!!  CLICK   TO ENLARGE"


def _cut_off(scene: Scene, rng: np.random.Generator) -> str:
    colour, noun = _first_group(scene)
    month = _MONTHS[rng.integers(len(_MONTHS))]
    return f"How to draw a {colour} {noun} step by step, posted in {month} {int(rng.integers(2008, 2021))} by adm..."


def _number(rng: np.random.Generator) -> int:
    return int(rng.integers(10_000, 99_999_999))


# Style -> (share, mean CLIP similarity of such text with its image, writer)
_STYLES: MappingProxyType[str, tuple[float, float, Callable[[Scene, np.random.Generator], str]]] = MappingProxyType(
    {
        "plain": (0.24, 0.345, _plain),
        "shop": (0.19, 0.325, _shop),
        "stock": (0.12, 0.335, _stock),
        "slug": (0.09, 0.325, _slug),
        "file_name": (0.08, 0.308, _file_name),
        "elsewhere": (0.10, 0.318, _elsewhere),
        "entities": (0.06, 0.325, _entities),
        "emoji": (0.05, 0.32, _emoji),
        "cut_off": (0.04, 0.322, _cut_off),
        "shouting": (0.03, 0.33, _shouting),
    }
)
LICENCES = ("?", "https://creativecommons.org/licenses/by/2.0/", "https://creativecommons.org/licenses/by-nc-sa/2.0/")


def draw_text(scene: Scene, rng: np.random.Generator) -> tuple[str, float]:
    """Return alt text for a scene and a matching similarity in [0.3, 0.45], the range that LAION-400M publishes."""
    names = list(_STYLES)
    shares = np.array([_STYLES[name][0] for name in names])
    _, mean, write = _STYLES[names[rng.choice(len(names), p=shares / shares.sum())]]
    similarity = float(np.clip(mean + rng.normal(0.0, 0.018), 0.3, 0.45))
    return write(scene, rng), round(similarity, 9)


def draw_licence(rng: np.random.Generator) -> str | None:
    """Return a LICENSE value: "?" for nearly all, as in LAION."""
    return LICENCES[rng.choice(3, p=(0.95, 0.03, 0.02))] if rng.random() > 0.01 else None


def draw_path(scene: Scene, rng: np.random.Generator, suffix: str) -> str:
    """Return a typical image URL path with a ``{number}`` placeholder, such as ``site/folder/red-car-{number}.jpg``."""
    colour, noun = _first_group(scene)
    site, folder = _SITES[rng.integers(len(_SITES))], _FOLDERS[rng.integers(len(_FOLDERS))]
    stem = rng.choice([f"{colour}-{noun}", f"{noun}_{colour}", noun.upper(), f"{noun}%20{colour}", "il_570xN", "hero"])
    return f"{site}/{folder}/{stem}-{{number}}{suffix}"
