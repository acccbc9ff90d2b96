"""What mkdocs asks while it builds: generated pages, images of measurements, and llms.txt. See mkdocs.yml."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import method_pages
import notebook_pages
import reference_pages
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.nav import Navigation, Section
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent.parent
NOTEBOOKS = {"start/quickstart.ipynb": "start/quickstart-notebook", "start/mathematics.ipynb": "start/mathematics"}
TABLE = re.compile(r"<!-- table \w+ -->.*?<!-- end -->", re.DOTALL)
RESULTS = re.compile(r"\]\((?:\.\./)*eval/results/(\w+\.(?:png|webp))\)")  # as GitHub wants it, from a file in docs/


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Complete the navigation by what is generated."""
    benchmarks = sorted((file.name for file in (ROOT / "docs/benchmarks").glob("*.md")), key=_index_first)
    folders: dict[str, list[Any]] = {"Benchmarks": [f"benchmarks/{name}" for name in benchmarks]}
    folders["Methods"] = [method_pages.page_of(cls) for cls in method_pages.all_methods()]
    folders["Reference"] = [{"API": [f"reference/api/{room.name}.md" for room in reference_pages.rooms()]}]
    for section in config.nav or []:
        for name in section.keys() & folders.keys():
            section[name] = [*section[name], *folders[name]]
    return config


def _index_first(name: str) -> tuple[bool, str]:
    return name != "index.md", name


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages and images."""
    texts: dict[str, str | bytes] = {**method_pages.pages(), **reference_pages.pages()}
    # the changelog links to pages from the root of the repository
    texts["changelog.md"] = (ROOT / "CHANGELOG.md").read_text().replace("](docs/", "](")
    for notebook, name in NOTEBOOKS.items():
        texts[f"{name}.md"], images = notebook_pages.page(ROOT / "docs" / notebook)
        texts |= {f"start/{image}": content for image, content in images.items()}
    for path, content in texts.items():
        files.append(File.generated(config, path, content=content))
    results = ROOT / "eval/results"
    for image in [*results.glob("*.png"), *results.glob("*.webp")]:
        files.append(File.generated(config, f"results/{image.name}", abs_src_path=str(image)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:  # noqa: ANN401
    """Point links to measured images and to notebooks to where the site has them; mark measured tables."""
    up = "../" * page.file.src_uri.count("/")
    for notebook, name in NOTEBOOKS.items():
        markdown = re.sub(rf"{Path(notebook).name}\)(?!\{{)", f"{Path(name).name}.md)", markdown)
    markdown = TABLE.sub(r'<div class="figures" markdown>\n\n\g<0>\n\n</div>', markdown)
    return RESULTS.sub(rf"]({up}results/\1)", markdown)


def on_nav(nav: Navigation, **_: Any) -> None:  # noqa: ANN401
    """Keep the navigation for llms.txt, which is written when every page has its title."""
    global navigation
    navigation = nav


def on_post_build(config: MkDocsConfig) -> None:
    """Write llms.txt: every page with its first sentence, https://llmstxt.org."""
    lines = [f"# {config.site_name}", "", f"> {config.site_description}"]
    for item in navigation.items:
        lines += ["", f"## {item.title}", ""]
        lines += [f"- [{page.title}]({page.url or './'}): {_first(page)}" for page in _pages(item)]
    (Path(config.site_dir) / "llms.txt").write_text("\n".join(lines) + "\n")


def _pages(item: Any) -> list[Page]:  # noqa: ANN401
    return [page for child in item.children for page in _pages(child)] if isinstance(item, Section) else [item]


def _first(page: Page) -> str:
    """The first sentence of a page's text."""
    blocks = re.split(r"\n\s*\n", page.markdown or "")
    prose = [block for block in blocks if re.match(r"[A-Za-z`*\[]", block) and not re.search("```|<!--", block)]
    return re.split(r"(?<=\.) ", " ".join(prose[0].split()))[0] if prose else ""
