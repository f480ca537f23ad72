"""Licences of the weights that a model is made of reach the card of the model."""

from bifocal.hub.card import Card
from bifocal.hub.export import export_model, read_card
from bifocal.hub.source_card import SourceCard, as_data, common_license, sources_of_start


def test_a_trained_model_names_the_licence_of_what_it_started_from(model, processor, tmp_path):
    licensed = export_model(model, tmp_path / "licensed", processor, Card(license="cc-by-nc-4.0"))
    (source,) = sources_of_start([str(licensed)])
    assert source == SourceCard("licensed", "cc-by-nc-4.0", on_hub=False)

    card = Card(license=common_license([source]), sources=as_data([source]))
    trained = export_model(model, tmp_path / "trained", processor, card)
    assert "licensed (licence: cc-by-nc-4.0)" in (trained / "README.md").read_text()
    assert read_card(trained).license == "cc-by-nc-4.0"
    assert sources_of_start([str(trained)]) == [source], "not the model in between"


def test_towers_with_different_licences_have_no_common_one(model, processor, tmp_path):
    starts = [
        str(export_model(model, tmp_path / name, processor, Card(license=licence)))
        for name, licence in (("text", "mit"), ("image", "cc-by-nc-4.0"))
    ]
    sources = sources_of_start(starts)
    assert [source.license for source in sources] == ["mit", "cc-by-nc-4.0"]
    assert common_license(sources) is None


def test_a_model_from_nothing_has_no_sources(model, processor, tmp_path):
    own = export_model(model, tmp_path / "own", processor, Card())
    assert sources_of_start([str(own)]) == sources_of_start([]) == []
    assert common_license([]) is None


def test_the_metadata_of_another_folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    assert [source.license for source in sources_of_start([str(tmp_path)])] == ["apache-2.0"]
