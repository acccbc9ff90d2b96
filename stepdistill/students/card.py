"""The model card of a student folder: code that runs as pasted, the sampling contract, and the licence."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Template
from yaml import safe_dump

from stepdistill.config.schema import dotted
from stepdistill.families.location import BUNDLED_NAMES
from stepdistill.networks.lora.names import PIPELINES
from stepdistill.networks.lora.tensors import FAMILIES
from stepdistill.students.contract import STUDENTS, Contract, MultiContract, read_contract, teacher
from stepdistill.students.extracted import Extracted
from stepdistill.students.measured import measured_section
from stepdistill.students.sizes import size_rows
from stepdistill.students.snippets import multi_snippet, snippet

# the hub refuses any other value of `license:`, which then is `other` with a `license_name`
HUB_LICENCES = re.compile(
    r"apache-2\.0|mit|openrail(\+\+)?|creativeml-openrail-m|bigscience-openrail-m|cc0-1\.0|cc"
    r"|cc-by(-nc)?(-sa|-nd)?-[234]\.0|[al]?gpl(-[23]\.[01])?|bsd(-[23]-clause)?|unlicense|other|unknown"
)

TEMPLATE = """\
---
{{ card_data }}
---

{% if training -%}
# Training assistant for {{ name }}

A training assistant for a few-step model of {{ base }}, made with stepdistill. It turns the few-step model back into a
diffusion model of many steps. While it is on, a LoRA can learn new images without undoing the few steps. It is for
training only: leave it out where images are generated.
{%- else -%}
# {{ name }} in {{ steps }}

{% if extracted -%}
{{ what }} extracted with stepdistill from the few-step model `{{ extracted }}`, as its difference from {{ base }}. It
was not trained. It generates {{ output }} in {{ steps }}. Load it with {{ loader }}. The licence of `{{ extracted }}`
applies to it, too.
{%- else -%}
{{ what }} distilled from {{ base }} with stepdistill, by the method `{{ method }}`. The student generates
{{ output }} in {{ steps }}. Load it with {{ loader }}.
{%- endif %}
{%- endif %}
{% if grid %}
![Images of the teacher and of the student from the same prompts and seeds](samples/grid.png)
{% endif %}
## How to use

{% if training -%}
Fine-tune the same few-step model with this line in the config:

```yaml
train: {assistant: {{ address }}}
```
{%- else -%}
```python
{{ snippet }}
```
{%- endif %}
{% if stages %}
The student was trained on top of {{ stages }}, and the file includes both. `last_lora.safetensors` is what was trained
last, alone. Beside the LoRA that it was trained on, it can have a strength of its own.
{% endif %}{% if tunable %}
To teach the student something new, such as a style, train a LoRA on the base model without the student, and load both.
A LoRA that is trained plainly on top of the student undoes its few steps.
{% endif %}{% if lora %}
`pytorch_lora_weights.safetensors` is for Diffusers and programs built on it. Do not load it in ComfyUI, which ignores
its alpha and some of its layers without an error. Use a file that ends in `_comfyui.safetensors`, or write one:
`stepdistill convert FOLDER OUT.safetensors --to comfyui`.
{% endif %}
## Sampling contract

{{ subject }} was trained for these values. Its images are worse with another sampler or with other timesteps.
`distill_config.json` holds the same values for programs.

| | |
| --- | --- |
{% for key, value in rows %}| {{ key }} | {{ value }} |
{% endfor %}
{% if difference is not none %}
The output of this folder in a plain Diffusers pipeline was compared with the output of the {{ kind }} student. The
largest difference is {{ "%.1e" | format(difference) }}, relative to the teacher's largest value.
{% else %}
**This folder has not been compared with the {{ kind }} student.**
{% endif %}
{{ figures }}{{ terms }}

## {{ "Extraction" if extracted else "Training" }}

```yaml
{{ recipe }}
```
"""

MULTI = """\
---
{{ card_data }}
---

# {{ name }} with {{ students }} students

{{ students }} few-step students distilled from {{ base }} with stepdistill, after
[Song et al. 2024](https://arxiv.org/abs/2410.23274). Each student was trained on a part of the prompts. A router picks
the student of a prompt.

## How to use

```python
{{ snippet }}
```

stepdistill reads `router.json` and switches between the students. Each student generates its prompts as one batch, with
its own sampling contract. The card of a student shows how to load it alone:

| student | steps | difference |
| --- | --- | --- |
{% for k, steps, difference in rows %}| [{{ k }}](students/{{ k }}/README.md) | {{ steps }} | {{ difference }} |
{% endfor %}
The difference is the largest one between the output of the student's folder in a plain Diffusers pipeline and that of
the trained student, relative to the teacher's largest value.

{{ terms }}
"""

WHAT = {"lora": "A LoRA", "full": "A smaller network", "adapters": "Guidance adapters"}

TERMS = """\
## Base model and licence

The base model is {{ base }}. {% if licence -%}
Its licence is `{{ licence }}`. The weights in this folder are derived from the base model, so its licence applies to
them, too.
{%- else -%}
Its licence was not known when this card was written. The weights in this folder are derived from the base model, so
its licence applies to them, too. Check it before you use or share them.
{%- endif %}
"""


def write_card(folder: Path, contract: Contract, address: str | None = None) -> None:
    """Write `README.md` into a student folder. It shows `samples/grid.png` and `eval.json` if the folder has them.

    Args:
        address: where the code loads the student from, such as a hub id; None is the folder itself.
    """
    n, layout = len(contract.timesteps), PIPELINES.get(teacher(contract).pipeline_class.__name__)
    drawn = contract.kind == "lora" and contract.use == "sampling"
    extracted = contract.method["tuned"] if contract.method["type"] == dotted(Extracted) else None
    card = ModelCard.from_template(
        _front_matter(contract),
        template_str=TEMPLATE,
        **_base(contract),
        steps=f"{n} step{'s' * (n > 1)}",
        output="a video" if _is_video(contract) else "an image",
        what="A network" if contract.network and contract.network.fused else WHAT[contract.kind],
        stages=_stages(contract),
        lora=drawn and layout in FAMILIES["comfyui"],
        loader="stepdistill" if contract.adapters else "plain Diffusers",
        extracted=extracted,
        kind="extracted" if extracted else "trained",
        subject="The few-step model" if extracted else "The student",
        method=str(contract.method["type"]).rpartition(".")[2],
        grid=(folder / "samples" / "grid.png").exists(),
        snippet=snippet(contract, address or folder.resolve()),
        address=address or folder.resolve(),
        training=contract.use == "training",
        tunable=drawn,
        rows=_rows(contract),
        difference=contract.proof.difference if contract.proof else None,
        figures=measured_section(folder),
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


def _is_video(contract: Contract | MultiContract) -> bool:
    return teacher(contract).arguments().get("num_frames", 1) > 1


def _front_matter(contract: Contract | MultiContract) -> ModelCardData:
    """The metadata that the hub reads."""
    base, licence = contract.base_model, contract.licence
    known = licence is not None and HUB_LICENCES.fullmatch(licence)
    lora = ["lora", "template:sd-lora"] if contract.kind in ("lora", "multi") else []
    task = "text-to-video" if _is_video(contract) else "text-to-image"
    return ModelCardData(
        base_model=base if _is_hub_id(base) else None,  # the hub accepts only its own ids
        library_name="diffusers",
        license=licence if known or licence is None else "other",
        license_name=None if known else licence,
        pipeline_tag=task,
        tags=[task, "diffusers", *lora, "stepdistill", "step-distillation"],
    )


def _base(contract: Contract | MultiContract) -> dict[str, str]:
    """What a card says about the base model: its name, a link to it, and its licence."""
    name, licence = contract.base_model, contract.licence
    base = f"[{name}](https://huggingface.co/{name})" if _is_hub_id(name) else f"`{name}`"
    terms = Template(TERMS).render(base=base, licence=licence)
    return {"name": name.rpartition("/")[2], "base": base, "terms": terms}


def _rows(contract: Contract) -> list[tuple[str, str]]:
    """The rows of the table of the sampling contract."""
    scale, frames = contract.guidance_scale, contract.call.get("num_frames", 1)
    return [
        ("scheduler", f"`{contract.scheduler['_class_name']}`, configured in `scheduler/`"),
        ("timesteps", ", ".join(f"{t:g}" for t in contract.timesteps)),
        ("noise levels (sigma)", ", ".join(f"{sigma:.4g}" for sigma in contract.sigmas)),
        ("prediction type", contract.prediction_type),
        ("eta (fresh noise in each step, from 0 to 1)", f"{contract.eta:g}" + ", ancestral" * contract.ancestral),
        ("guidance_scale", f"{scale:g}" + (" (no guidance is needed: it is in the weights)" if scale == 1 else "")),
        *_range(contract),
        ("negative prompts", "supported" if contract.negative_prompt else "no effect"),
        _weights(contract),
        *size_rows(contract),
        *([("frames", f"{frames}")] if frames > 1 else []),
        ("training precision", contract.dtype),
    ]


def _stages(contract: Contract) -> str:
    """The trainings before, such as "a student of `Consistency`"; nothing where there are none."""
    kinds = [
        f"a student of `{stage.method['type'].rpartition('.')[2]}`" for stage in contract.start_from if stage.method
    ]
    if len(kinds) < len(contract.start_from):  # the first has no contract
        kinds.insert(0, f"the LoRA `{Path(contract.start_from[0].source).name}`")
    return " and ".join(kinds)


def _range(contract: Contract) -> list[tuple[str, str]]:
    """The row of the scales that guidance adapters support."""
    if contract.adapters is None or contract.guidance_range is None:
        return []
    low, high = contract.guidance_range
    return [("scale of the adapters", f"{low:g} to {high:g} (default: {contract.adapters.guidance_scale:g})")]


def _weights(contract: Contract) -> tuple[str, str]:
    """The row of the trained weights."""
    if lora := contract.lora:
        return "LoRA", f"rank {lora.rank}, alpha {lora.alpha:g}, strength {lora.strength:g}"
    net = contract.network
    if adapters := contract.adapters:
        size = f"{adapters.parameters / 1e6:.2f} million parameters"
        return "guidance adapters", f"{adapters.arch}, width {adapters.width}, {size}"
    return "network", f"`{net.class_name}`, {net.parameters / 1e6:.2f} million parameters" if net else ""
