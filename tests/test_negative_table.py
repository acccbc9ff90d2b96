"""The table of negative prompts: its pairs come of a rule, its measures are known on made images."""

from __future__ import annotations

import torch
from tables import negative
from tables.render import RENDERERS

from stepdistill.data.bundled import emoji


def test_pairs_follow_from_the_captions():
    found = negative.pairs()
    assert [(pair.prompt, pair.word) for pair in found[:2]] == [("sky weather", "moon"), ("animal mammal", "face")]
    words = [pair for pair in found if pair.gallery != "heart"]
    for pair in words:
        names = [d.name.split() for d in emoji.subjects() if d.subgroup == pair.prompt]
        assert 4 <= sum(pair.word in name for name in names) <= len(names) / 2
        assert not any(pair.control in name for name in names)
    hearts = [(pair.prompt, pair.word, pair.control) for pair in found if pair.gallery == "heart"]
    assert hearts[:2] == [("heart", "red", "blue"), ("red heart", "red", "blue")] and len(hearts) == 4
    assert len({(pair.prompt, pair.word) for pair in found}) == len(found)


def test_a_word_is_shown_where_the_nearest_drawing_has_it(monkeypatch):
    known = (torch.tensor([[0.0], [1.0], [5.0]]), ["full moon", "moonlight", "sun"])
    monkeypatch.setattr(negative, "gallery", lambda prompt: known)
    shown = negative.named("sky weather", "moon", torch.zeros(4, 3, 2, 2), torch.tensor([[0.4], [0.6], [4.0], [-9.0]]))
    assert shown.tolist() == [1, 0, 0, 1]


def test_a_colour_is_the_share_of_strong_pixels_of_its_hue():
    colours = [(221, 46, 68), (253, 203, 88), (85, 172, 238), (250, 250, 250)]  # red, yellow, blue hearts; white
    image = torch.tensor(colours, dtype=torch.uint8).T.reshape(1, 3, 2, 2)
    grounds = torch.tensor(emoji.GROUNDS[2:], dtype=torch.uint8).T.reshape(1, 3, 2, 2)
    for hue in ("red", "yellow", "blue"):
        assert negative.coloured(hue, image, image).item() == 0.25
        assert negative.coloured(hue, grounds, grounds).item() == 0


def test_rows_are_rendered_with_means_over_their_pairs():
    def cell(shown, more):
        return {"shown": shown, "to_teacher": 50.0 + more, "to_drawings": 40.0, "seconds_per_image": 0.5} | (
            {"moved": 2.0 * more} if more else {}
        )

    row = {"n": 128, "steps": 1, "settings": {"0": cell(0.5, 0), "0.2": cell(0.125, 2)}, "other": {"0.2": cell(0.5, 1)}}
    row["settings"]["0"]["moved"] = 0.0
    text = RENDERERS["negative"]({"tiny-sd/dmd2/drink: glass": row, "tiny-sd/dmd2/heart: red": row})
    assert "| plain | scale 0.2 | 0.2, another word |" in text
    assert "| tiny-sd: dmd2, drink, not glass | 50.0 | 12.5 | 50.0 |" in text
    assert "| tiny-sd: dmd2: shown, % | 50.0 | 12.5 | 50.0 |" in text
    assert "| tiny-sd: dmd2: distance to the teacher's images of the concept | 50.0 | 52.0 | 51.0 |" in text
    assert "| tiny-sd: dmd2: change of the images that did not show it | 0.0 | 4.0 | 2.0 |" in text
    assert "| tiny-sd: dmd2: seconds / plain | 1.00 | 1.00 | 1.00 |" in text
