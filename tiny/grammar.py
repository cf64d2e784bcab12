"""The generated haystack: sentences from a small grammar, and needles that no such sentence could
be.

words.txt has the grammar's templates and lists of words. The bundled model was trained on them.
"""
import random
import re
from pathlib import Path

QUESTION = "The magic number for {key} is"
ANSWER = " {value}."


def load_grammar(file: Path) -> tuple[list[list[str]], dict[str, list[str]]]:
    """The templates of a words.txt, as lists of words, and its lists of words by name."""
    templates = []
    words = {}
    for line in file.read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        name, content = line.split(": ")
        if name == "template":
            templates.append(content.split())
        else:
            words.setdefault(name, []).extend(content.split())
    return templates, words


TINY = Path(__file__).resolve().parent  # the bundled checkpoint is here too
TEMPLATES, WORDS = load_grammar(TINY / "words.txt")
FIRST = WORDS.pop("first")  # a needle's key is one of these words and then one of SECOND
SECOND = WORDS.pop("second")


def sentence(rng: random.Random) -> str:
    """One random sentence of 5 to 20 words."""
    words = []
    for word in rng.choice(TEMPLATES):
        if word in WORDS:
            word = rng.choice(WORDS[word])
        words.append(word)
    text = " ".join(words).replace("_", " ").replace(" .", ".").replace(" ,", ",")
    text = re.sub(r"\ba (?=[aeiou])", "an ", text, flags=re.IGNORECASE)
    return text[0].upper() + text[1:]


def free_keys(text: str = "") -> list[str]:
    """The keys for needles, of two words, that are not in a text. The grammar has none of them."""
    keys = [f"{first} {second}" for first in FIRST for second in SECOND]
    return [key for key in keys if key not in text]


def draw_needles(rng: random.Random, count: int, keys: list[str]) -> list[tuple[str, str]]:
    """Draw `count` needles (key, value) with different keys. A value is a number of 5 to 7 digits.

    Raises ValueError if there are not enough keys.
    """
    if count > len(keys):
        raise ValueError(f"--needles {count} is too many; there are {len(keys)} keys for needles")
    needles = []
    for key in rng.sample(keys, count):
        digits = rng.randint(5, 7)
        value = rng.randrange(10 ** (digits - 1), 10 ** digits)
        needles.append((key, str(value)))
    return needles
