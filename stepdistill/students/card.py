"""The model card of a student folder: a snippet that runs as pasted, the sampling contract, the licence."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Template
from yaml import YAMLError, safe_dump

from stepdistill.families.base import BUNDLED_NAMES, Family
from stepdistill.students.contract import STUDENTS, Contract, MultiContract, read_contract
from stepdistill.students.snippets import multi_snippet, snippet

logger = logging.getLogger(__name__)

# the hub refuses any other value of `license:`, which then is `other` with a `license_name`
HUB_LICENCES = re.compile(
    r"apache-2\.0|mit|openrail(\+\+)?|creativeml-openrail-m|bigscience-openrail-m|cc0-1\.0|cc"
    r"|cc-by(-nc)?(-sa|-nd)?-[234]\.0|[al]?gpl(-[23]\.[01])?|bsd(-[23]-clause)?|unlicense|other|unknown"
)

TEMPLATE = """\
---
{{ card_data }}
---

# {{ name }} in {{ steps }}

{{ what }} with which {{ base }} draws an image in {{ steps }}. Distilled with stepdistill by the method
`{{ method }}`; {{ loader }} loads it.
{% if grid %}
![Images of teacher and student by the same prompts and seeds](samples/grid.png)
{% endif %}
## How to use

```python
{{ snippet }}
```

## Sampling contract

The student was trained for these values; with another sampler or other timesteps it draws worse. They are in
`distill_config.json`, too, for programs.

| | |
| --- | --- |
{% for key, value in rows %}| {{ key }} | {{ value }} |
{% endfor %}
{% if difference is not none %}
This folder, loaded into a plain pipeline, was compared with the student that was trained: the largest
difference is {{ "%.1e" | format(difference) }} of the teacher's largest value.
{% else %}
**This folder has not been compared with the student that was trained.**
{% endif %}
{{ terms }}

## Training

```yaml
{{ recipe }}
```
"""

MULTI = """\
---
{{ card_data }}
---

# {{ name }} by {{ students }} students

{{ students }} few-step LoRAs with which {{ base }} draws, each for its part of all prompts, and the router that picks
one by the prompt. Distilled with stepdistill after [Song et al. 2024](https://arxiv.org/abs/2410.23274).

## How to use

```python
{{ snippet }}
```

stepdistill reads `router.json` and switches between the LoRAs; each student draws its prompts as one batch, under its
own sampling contract. For one student alone plain Diffusers is enough, see its card:

| student | steps | difference |
| --- | --- | --- |
{% for k, steps, difference in rows %}| [{{ k }}](students/{{ k }}/README.md) | {{ steps }} | {{ difference }} |
{% endfor %}
The difference is the largest of a student's folder in a plain pipeline from the student that was trained, over the
teacher's largest value.

{{ terms }}
"""

WHAT = {"lora": "A LoRA", "full": "A smaller network", "adapters": "Guidance adapters"}

TERMS = """\
## Base model and licence

The base model is {{ base }}. {% if licence -%}
Its licence is `{{ licence }}`. This student is derived from it, and the licence applies here as well.
{%- else -%}
Its licence is not known to the program that wrote this card. This student is derived from it: look the
licence up, for it applies here as well.
{%- endif %}
"""


def write_card(folder: Path, contract: Contract, address: str | None = None) -> None:
    """Write `README.md` into a student folder; shows `samples/grid.png` where the folder has it.

    Args:
        address: what the snippet loads the student from, such as a hub id; None is the folder itself.
    """
    n = len(contract.timesteps)
    card = ModelCard.from_template(
        _front_matter(contract),
        template_str=TEMPLATE,
        **_base(contract),
        steps=f"{n} step{'s' * (n > 1)}",
        what="A network" if contract.network and contract.network.fused else WHAT[contract.kind],
        loader="stepdistill" if contract.adapters else "plain Diffusers",
        method=str(contract.method["type"]).rpartition(".")[2],
        grid=(folder / "samples" / "grid.png").exists(),
        snippet=snippet(contract, address or folder.resolve()),
        rows=_rows(contract),
        difference=contract.proof.difference if contract.proof else None,
        recipe=safe_dump(contract.method, sort_keys=False).strip(),
    )
    card.save(folder / "README.md")


def write_multi_card(folder: Path, contract: MultiContract) -> None:
    """Write `README.md` into a folder of several students."""
    each = {k: read_contract(folder / STUDENTS / str(k)) for k in range(contract.students)}
    card = ModelCard.from_template(
        _front_matter(contract),
        template_str=MULTI,
        **_base(contract),
        students=contract.students,
        snippet=multi_snippet(contract, folder.resolve()),
        rows=[(k, len(one.timesteps), f"{one.proof.difference:.1e}") for k, one in each.items() if one.proof],
    )
    card.save(folder / "README.md")


def _is_hub_id(base: str) -> bool:
    return base not in BUNDLED_NAMES and not Path(base).exists()


def _front_matter(contract: Contract | MultiContract) -> ModelCardData:
    """What the hub reads."""
    base, licence = contract.base_model, contract.licence
    known = licence is not None and HUB_LICENCES.fullmatch(licence)
    lora = ["lora", "template:sd-lora"] if contract.kind in ("lora", "multi") else []
    return ModelCardData(
        base_model=base if _is_hub_id(base) else None,  # the hub takes nothing but its own ids
        library_name="diffusers",
        license=licence if known or licence is None else "other",
        license_name=None if known else licence,
        pipeline_tag="text-to-image",
        tags=["text-to-image", "diffusers", *lora, "stepdistill", "step-distillation"],
    )


def _base(contract: Contract | MultiContract) -> dict[str, str]:
    """What a card says about the base: its name, where it is, its terms."""
    name, licence = contract.base_model, contract.licence
    base = f"[{name}](https://huggingface.co/{name})" if _is_hub_id(name) else f"`{name}`"
    terms = Template(TERMS).render(base=base, licence=licence)
    return {"name": name.rpartition("/")[2], "base": base, "terms": terms}


def _rows(contract: Contract) -> list[tuple[str, str]]:
    """The contract's table."""
    height, width = contract.resolution
    scale = contract.guidance_scale
    return [
        ("scheduler", f"`{contract.scheduler['_class_name']}`, configured in `scheduler/`"),
        ("timesteps", ", ".join(f"{t:g}" for t in contract.timesteps)),
        ("noise levels (sigma)", ", ".join(f"{sigma:.4g}" for sigma in contract.sigmas)),
        ("prediction type", contract.prediction_type),
        ("eta (share noised again)", f"{contract.eta:g}"),
        ("guidance_scale", f"{scale:g}" + (" (none: guidance is in the weights)" if scale == 1 else "")),
        *_range(contract),
        ("negative prompts", "work" if contract.negative_prompt else "have no effect"),
        _weights(contract),
        ("resolution", f"{width} x {height} pixels"),
        ("precision in training", contract.dtype),
    ]


def _range(contract: Contract) -> list[tuple[str, str]]:
    """The row of what adapters may be told."""
    if contract.adapters is None or contract.guidance_range is None:
        return []
    low, high = contract.guidance_range
    return [("scale of the adapters", f"{low:g} to {high:g}; {contract.adapters.guidance_scale:g} if none is set")]


def _weights(contract: Contract) -> tuple[str, str]:
    """The row of what was trained."""
    if lora := contract.lora:
        return "LoRA", f"rank {lora.rank}, alpha {lora.alpha:g}, strength {lora.strength:g}"
    net = contract.network
    if adapters := contract.adapters:
        size = f"{adapters.parameters / 1e6:.2f} million parameters"
        return "guidance adapters", f"{adapters.arch}, width {adapters.width}, {size}"
    return "network", f"`{net.class_name}` of {net.parameters / 1e6:.2f} million parameters" if net else ""


def licence_of(family: Family) -> str | None:
    """The licence that the teacher's own model card names; None where there is no card, or none in it."""
    where = family.location()
    readme = Path(where) / "README.md"
    if Path(where).exists() and not readme.exists():
        return None
    try:
        # a local card is a file; anything else is a hub id
        data = ModelCard.load(str(readme) if readme.exists() else where, ignore_metadata_errors=True).data
    except (OSError, ValueError, YAMLError) as error:
        logger.warning("cannot read the licence in the model card of %s: %s", where, error)
        return None
    licence = data.get("license_name") if data.get("license") == "other" else data.get("license")
    return ", ".join(licence) if isinstance(licence, list) else licence


def is_non_commercial(licence: str) -> bool:
    """Whether the identifier or name of a licence excludes commercial use, or allows nothing but research."""
    words = re.sub(r"[\s_]+", "-", licence.lower())
    return re.search(r"(^|[^a-z])nc($|[^a-z])|non-?commercial|research|academic", words) is not None


def warn_of_licence(family: Family) -> None:
    """Warn where the teacher, and with it every student, is not for commercial use."""
    licence = licence_of(family)
    if licence is not None and is_non_commercial(licence):
        logger.warning(
            "the licence of the teacher %s is %s, which excludes commercial use: students are derived from "
            "their teacher, and fall under the same terms",
            family.pretrained_teacher_model,
            licence,
        )
