"""The evaluation protocols: how suites, results and model cards name them, and which rows they read."""

from typing import Literal, NamedTuple

ProtocolName = Literal[
    "image-text-retrieval", "zero-shot", "linear-probe", "sts", "pair-classification", "text-retrieval"
]

# Prompts of a class; the mean of their embeddings is the embedding of the class (arXiv 2103.00020, section 3.1.4).
TEMPLATES = (
    "a photo of a {}.", "a good photo of a {}.", "a close-up photo of a {}.", "a photo of the {}.",
    "a blurry photo of a {}.", "a picture of a {}.", "an image of a {}.",
)  # fmt: skip


class Protocol(NamedTuple):
    """
    Args:
        title: what pages and model cards call it.
        row_kind: the kind of its rows, see `kinds`.
        hub_task: the Hub's task for its results.
    """

    title: str
    row_kind: str
    hub_task: str

    @property
    def needs_images(self) -> bool:
        return self.row_kind.startswith("image-")


PROTOCOLS: dict[str, Protocol] = {
    "image-text-retrieval": Protocol("image-text retrieval", "image-text", "feature-extraction"),
    "zero-shot": Protocol("zero-shot classification", "image-label", "zero-shot-image-classification"),
    "linear-probe": Protocol("linear probe", "image-label", "image-classification"),
    "sts": Protocol("semantic textual similarity", "scored-pair", "sentence-similarity"),
    "pair-classification": Protocol("pair classification", "scored-pair", "sentence-similarity"),
    "text-retrieval": Protocol("text retrieval", "text-pair", "feature-extraction"),
}


def find_protocol(name: str) -> Protocol:
    """Return the protocol with a name; the name of any other, such as mteb's "MTEB STS", is its title."""
    return PROTOCOLS.get(name) or Protocol(name, "", "feature-extraction")
