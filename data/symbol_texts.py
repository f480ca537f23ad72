"""Texts about a Unicode symbol: its name in plain words, long captions, descriptions, and names to confuse it with.

All is composed from the Unicode character database (Python's `unicodedata` and the scripts and blocks of fontTools), in
wordings drawn from a given random generator.
"""

import random
import re
import unicodedata
from fractions import Fraction

import numpy as np
from fontTools import unicodedata as scripts

KINDS = {
    "Lu": "a capital letter", "Ll": "a small letter", "Lt": "a title case letter", "Lm": "a modifier letter",
    "Lo": "a letter", "Mn": "a combining mark", "Mc": "a spacing mark", "Me": "an enclosing mark",
    "Nd": "a decimal digit", "Nl": "a letter number", "No": "a number sign", "Pc": "a joining punctuation mark",
    "Pd": "a dash", "Ps": "an opening bracket", "Pe": "a closing bracket", "Pi": "an opening quotation mark",
    "Pf": "a closing quotation mark", "Po": "a punctuation mark", "Sm": "a mathematical sign",
    "Sc": "a currency sign", "Sk": "a modifier sign", "So": "a pictorial sign",
}  # fmt: skip
DECOMPOSITIONS = {
    "": "it is put together from {}", "<font>": "it is a typeface variant of {}", "<circle>": "it is {} in a ring",
    "<initial>": "it is what {} looks like at the start of a word",
    "<medial>": "it is what {} looks like inside a word", "<final>": "it is what {} looks like at the end of a word",
    "<isolated>": "it is what {} looks like when it stands alone", "<super>": "it is {} set high",
    "<sub>": "it is {} set low", "<fraction>": "it is the fraction of {}", "<compat>": "it stands for {}",
    "<square>": "it is {} in a square", "<wide>": "it is a wide {}", "<narrow>": "it is a narrow {}",
    "<small>": "it is a small {}", "<vertical>": "it is an upright {}", "<noBreak>": "it is {} without a break",
}  # fmt: skip
# Paraphrases of words of Unicode names; the longest match comes first.
SYNONYMS = {
    "mathematical": ["maths"], "sans serif": ["without serifs"], "double struck": ["blackboard style"],
    "monospace": ["typewriter style"], "fraktur": ["gothic type"], "script": ["handwritten"], "italic": ["slanted"],
    "bold": ["thick type"], "capital letter": ["upper case", "big letter"],
    "small letter": ["lower case", "little letter"], "capital": ["upper case"], "small": ["little"],
    "isolated form": ["standing alone"], "initial form": ["starting a word"], "medial form": ["inside a word"],
    "final form": ["ending a word"], "ligature": ["joined letters"], "braille pattern dots": ["raised points"],
    "box drawings": ["frame piece", "piece of a frame"], "heavy": ["thick"], "light": ["thin"],
    "black": ["filled", "solid"], "white": ["hollow", "outlined"], "leftwards": ["to the left"],
    "rightwards": ["to the right"], "upwards": ["to the top"], "downwards": ["to the bottom"],
    "left": ["left hand"], "right": ["right hand"], "up": ["top"], "down": ["bottom"], "vertical": ["upright"],
    "horizontal": ["level"], "double": ["twofold"], "triple": ["threefold"], "circled": ["ringed", "in a circle"],
    "parenthesized": ["in brackets"], "turned": ["upside down"], "reversed": ["mirrored"], "above": ["on top"],
    "below": ["underneath"], "sign": ["mark"], "symbol": ["emblem"], "syllabics": ["syllable"],
    "playing card": ["card"], "domino tile": ["domino"], "greater than": ["more than"],
    "less than": ["smaller than"], "equal to": ["same as"], "acute": ["rising accent"], "grave": ["falling accent"],
    "circumflex": ["roof accent"], "diaeresis": ["two dots"], "tilde": ["wavy line"], "macron": ["bar on top"],
    "stroke": ["slash"], "and": ["plus", "as well as"], "without": ["lacking"], "modifier letter": ["modifier"],
    "superscript": ["raised"], "subscript": ["lowered"], "vulgar fraction": ["fraction"],
    "0": ["zero"], "1": ["one"], "2": ["two"], "3": ["three"], "4": ["four"], "5": ["five"], "6": ["six"],
    "7": ["seven"], "8": ["eight"],
}  # fmt: skip
_SYNONYM_PATTERN = re.compile(r"\b(" + "|".join(sorted(map(re.escape, SYNONYMS), key=len, reverse=True)) + r")\b")


def plain_name(symbol: str) -> str:
    """Return the Unicode name in lower case, hyphens as spaces and the dots of a braille pattern one by one.

    >>> plain_name("é"), plain_name("⠓")
    ('latin small letter e with acute', 'braille pattern dots 1 2 5')
    """
    name = unicodedata.name(symbol).lower().replace("-", " ")
    if name.startswith("braille pattern dots"):
        name = "braille pattern dots " + " ".join(name.split()[-1])
    return name


def facts(symbol: str, hidden: frozenset[str] = frozenset()) -> list[str]:
    """Return what Unicode says about a symbol besides its name, as clauses without capital or full stop.

    Args:
        hidden: symbols that no sentence may name: what training must not hear of.
    """
    category = unicodedata.category(symbol)
    kind = KINDS[category]
    script = scripts.script_name(scripts.script(symbol)).replace("_", " ").lower()
    known = [f"it is {kind}" + (f" of the {script} script" if script not in ("common", "inherited") else "")]
    known.append(f"it belongs to the block {scripts.block(symbol).replace('-', ' ').lower()}")
    parts = unicodedata.decomposition(symbol).split()
    if parts:
        tag = parts.pop(0) if parts[0].startswith("<") else ""
        pieces = [plain_name(chr(int(code, 16))) for code in parts if unicodedata.name(chr(int(code, 16)), "")]
        if pieces and not hidden.intersection(chr(int(code, 16)) for code in parts):
            known.append(DECOMPOSITIONS.get(tag, "it stands for {}").format(" and ".join(pieces)))
    for partner, label in ((symbol.lower(), "small"), (symbol.upper(), "capital")):
        if len(partner) == 1 and partner not in hidden | {symbol} and unicodedata.name(partner, "") != "":
            known.append(f"its {label} form is {plain_name(partner)}")
    number = unicodedata.numeric(symbol, None)
    if number is not None:
        known.append(f"its value is {Fraction(number).limit_denominator(1000)}")
    if unicodedata.combining(symbol):
        position = {220: " below", 230: " above"}.get(unicodedata.combining(symbol), "")
        known.append(f"it combines with the letter before it{position}")
    if unicodedata.mirrored(symbol):
        known.append("it turns around in text from right to left")
    if unicodedata.bidirectional(symbol) in ("R", "AL"):
        known.append("it is written from right to left")
    return known


def paraphrase(name: str, generator: random.Random) -> str:
    """Return the name in other words: synonyms replace most words, and what follows "with" may come first."""

    def replace(match: re.Match) -> str:
        return generator.choice(SYNONYMS[match[0]]) if generator.random() < 0.75 else match[0]

    head, _, tail = name.partition(" with ")
    head, tail = (_SYNONYM_PATTERN.sub(replace, part) for part in (head, tail))
    if not tail:
        return head
    return generator.choice([f"{tail} on {head}", f"{head} carrying {tail}", f"{head} that has {tail}"])


def long_caption(symbol: str, generator: random.Random, hidden: frozenset[str] = frozenset()) -> str:
    """Return a caption of a few sentences that says the name once and then what Unicode knows, in random order."""
    opening = generator.choice(
        ["the picture shows {}", "a drawing of {}", "this is the sign called {}", "here one sees {}", "{}"]
    ).format(plain_name(symbol))
    known = facts(symbol, hidden)
    generator.shuffle(known)
    return ". ".join([opening, *known]) + "."


def describe(symbol: str, generator: random.Random, hidden: frozenset[str] = frozenset()) -> str:
    """Return what the symbol is, in other words than its name: a paraphrase and up to three facts."""
    known = facts(symbol, hidden)
    generator.shuffle(known)
    return ". ".join([paraphrase(plain_name(symbol), generator), *known[: generator.randint(1, 3)]]) + "."


def confusable_names(names: list[str], count: int) -> list[list[str]]:
    """Return for each name the `count` other names with the most similar words (cosine, weighted by rarity).

    Ties go to the name that comes first, so the result is a function of the list.
    """
    vocabulary = {word: number for number, word in enumerate(sorted({word for name in names for word in name.split()}))}
    counts = np.zeros((len(names), len(vocabulary)), dtype=np.float32)
    for row, name in enumerate(names):
        for word in name.split():
            counts[row, vocabulary[word]] += 1.0
    weighted = counts * np.log(len(names) / (counts > 0).sum(axis=0))
    weighted /= np.maximum(np.linalg.norm(weighted, axis=1, keepdims=True), 1e-9)
    confusable = []
    for start in range(0, len(names), 512):
        similarity = np.round(weighted[start : start + 512] @ weighted.T, 5)
        similarity[np.arange(len(similarity)), np.arange(start, start + len(similarity))] = -1.0
        nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :count]
        confusable += [[names[other] for other in row] for row in nearest]
    return confusable
