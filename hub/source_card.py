"""The name and licence of a source, for the card of the model that is made of it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bifocal.errors import looks_like_path
from bifocal.hub.export import CARD_DATA, read_card
from bifocal.hub.source_files import licence_on_card, local_path


@dataclass(frozen=True)
class SourceCard:
    """The name and licence of a model that another one is made of.

    Args:
        name: Hub id, or the last part of a local path.
        license: name of the licence on the Hub; None if the source does not say it.
        on_hub: whether the name is a Hub id.
    """

    name: str
    license: str | None = None
    on_hub: bool = False

    def text(self) -> str:
        """Return the name and licence as a part of a sentence."""
        return f"{self.name} ({self.license or 'its licence is not stated'})"


def read_source_card(source: str, folder: Path) -> SourceCard:
    """Return the name and licence of a source.

    Args:
        source: Hub id, folder or file.
        folder: local folder with its README.md, if it has one.
    """
    on_hub = not Path(source).expanduser().exists() and not looks_like_path(source)
    name = source if on_hub else Path(source).resolve().name
    return SourceCard(name, licence_on_card(folder / "README.md"), on_hub)


def common_license(sources: list[SourceCard]) -> str | None:
    """Return the licence of a model made of several; None if they differ or one is not stated."""
    licences = {source.license for source in sources}
    return licences.pop() if len(licences) == 1 else None


def sources_of_start(starts: Sequence[str]) -> list[SourceCard]:
    """Return the models whose weights are in a trained model, with their licences.

    Those of a Bifocal model are what its own card names; one that was trained from nothing has none.

    Args:
        starts: folders or Hub ids that the training started from.
    """
    sources: list[SourceCard] = []
    for start in starts:
        data, readme = local_path(start, CARD_DATA), local_path(start, "README.md")
        if data is None:
            folder = Path(start) if readme is None else readme.parent
            sources.append(read_source_card(start, folder))
            continue
        card = read_card(data.parent)
        own = [SourceCard(**source) for source in card.sources]
        if not own and card.license is not None:
            own = [read_source_card(start, data.parent)]
        sources += own
    return list(dict.fromkeys(sources))


def as_data(sources: Sequence[SourceCard]) -> list[dict[str, object]]:
    """Return sources as a card keeps them."""
    return [asdict(source) for source in sources]
