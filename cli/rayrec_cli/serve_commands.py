"""serve: the application on this machine."""

import signal
import threading
from typing import Any

from rayrec.serving.serve_config import ServeConfig
from rayrec_cli.app import app
from rayrec_cli.options import Call, command
from rayrec_cli.output import Shown, note


@command(app, "serve", config=ServeConfig, example="rayrec serve --port 8000")
def serve(call: Call, config: ServeConfig) -> Shown:
    """Answer requests for recommendations over HTTP.

    Runs the application on this machine until Ctrl-C, and follows the live release: `rayrec release activate`
    moves it to another one while it runs. For a cluster see cluster/serve.yaml.
    """
    from rayrec.serving.run import running

    ended = threading.Event()
    with running(call.workspace, config) as url:
        signal.signal(signal.SIGTERM, lambda *_: ended.set())  # after Ray's own handler, which aborts the process
        note(f"Serving at {url} (Ctrl-C ends it)")  # short: whoever waits for the URL finds it in one line
        data: dict[str, Any] = {"url": url, "workspace": call.workspace.uri}
        try:
            while not ended.wait(3600):
                pass
        except KeyboardInterrupt:
            note("Ending")
    return Shown(data, ["Ended."])
