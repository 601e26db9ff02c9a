"""All models in a browser: roll out turbulence, write text, invert KHRONOS, query VSNA, design a cell with Janus.

    python -m eval.app --models runs

Needs the extra `app`: `pip install ".[app]"`. Trained models are those that `make demo`, `make text` and `make janus`
leave in a folder; a tab without its model says how to make it. What fits in seconds is fitted when the app starts.

It listens on this machine alone and asks nobody else for anything: no share link, no analytics, no fonts from outside.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

# Read by gradio whenever it would report to its makers; what somebody has set stays.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr

from eval import app_janus, app_khronos, app_text, app_turbulence, app_vsna

MODELS = Path("runs")
MAX_WAITING = 32  # requests in the queue
KEPT = (600, 3600)  # seconds: how often to look for pictures to delete, and how long they are kept
MAX_UPLOAD = 1024  # bytes; no tab takes a file
CSS = """
.gradio-container {width: 100% !important; max-width: 1240px !important; margin: 0 auto !important}
footer {display: none !important}
"""


def build_app(models: str | Path = MODELS) -> gr.Blocks:
    """The app over a folder of trained models; nothing is served before it is launched.

    Args:
        models: Folder with ``demo/model`` and ``demo/data.hdf5``, ``vsna/heat`` and ``vsna/burgers``, ``text/model``
            and ``janus/model``, as make and `training.vsna` leave them; of each what there is.
    """
    models = Path(models)
    # Old pictures are deleted: every move of a slider makes one.
    with gr.Blocks(title="leviathan-sna", analytics_enabled=False, delete_cache=KEPT) as app:
        gr.Markdown("# Separable neural architectures\nFunctions of many inputs from small functions of one input.")
        with gr.Tabs():
            with gr.Tab("Invert KHRONOS", id="khronos"):
                app_khronos.tab(app)
            with gr.Tab("Query VSNA", id="vsna"):
                app_vsna.tab(app, models / "vsna")
            with gr.Tab("Roll out turbulence", id="turbulence"):
                app_turbulence.tab(models / "demo")
            with gr.Tab("Write text", id="text"):
                app_text.tab(models / "text" / "model")
            with gr.Tab("Design a Janus cell", id="janus"):
                app_janus.tab(models / "janus" / "model")
    # One job of a kind at a time; what takes seconds shares one place, see `eval.app_manners`.
    return app.queue(max_size=MAX_WAITING, default_concurrency_limit=1, api_open=False)


def theme() -> gr.Theme:
    """Gradio's own, with the fonts that every system has."""
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    return gr.themes.Default(primary_hue="orange", neutral_hue="slate", **fonts)


def launch(app: gr.Blocks, port: int | None = None, *, block: bool = True) -> str:
    """Serves the app, on this machine alone unless GRADIO_SERVER_NAME says otherwise; returns its address.

    Args:
        app: Of `build_app`.
        port: None for the first free one from 7860 on, or that of GRADIO_SERVER_PORT.
        block: Whether to stay until the app is closed.

    Raises:
        OSError: If the port is taken.
    """
    app.launch(
        server_port=port,
        share=False,
        prevent_thread_lock=not block,
        allowed_paths=[],
        max_file_size=MAX_UPLOAD,
        enable_monitoring=False,
        run_history=False,
        footer_links=[],
        mcp_server=False,
        ssr_mode=False,  # would start a second server
        pwa=False,
        theme=theme(),
        css=CSS,
    )
    return app.local_url


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=MODELS, help="folder of trained models; default: %(default)s")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    args = parser.parse_args(arguments)
    if args.port is not None and not 1 <= args.port <= 65535:
        parser.error(f"--port {args.port}: expected a number from 1 to 65535")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    args = parse(arguments)
    try:
        launch(build_app(args.models), args.port)
    except OSError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
