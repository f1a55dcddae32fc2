"""Exit codes, one clear line for bad input, and a stdout that holds only the result."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rayrec.bench.bench_config import CONFIGS
from rayrec.errors import DamagedInputError, LeakError, NotFoundError
from rayrec.jobs.submit import STOPPED, JobEnd
from rayrec.storage import artifacts
from rayrec.storage.artifacts import DatasetManifest, Manifest, write_dataset_manifest
from rayrec.storage.workspace import Workspace
from rayrec_cli.main import main

HELP = Path(__file__).parents[2] / "artifacts" / "help.txt"
COMMANDS = (
    *("demo", "fit", "update", "generate", "inspect", "import", "split", "embed", "train", "taste", "index"),
    *("evaluate", "release"),
    *("recommend", "serve", "status", "run", "tune", "bench", "compact", "clean", "unlock", "verify"),
)
GROUPS = {"release": ("create", "list", "activate", "rollback", "verify"), "bench": tuple(CONFIGS)}


@pytest.fixture
def plays(tmp_path: Path) -> Path:
    """A file of two plays."""
    path = tmp_path / "plays.csv"
    path.write_text("user_id,song_id,ts\nann,s1,1400000000\nann,s2,1400000300\n")
    return path


@pytest.fixture
def filled(tmp_path: Path) -> str:
    """The path of a workspace whose data set spans ten days."""
    workspace = Workspace(tmp_path / "filled")
    write_dataset_manifest(
        workspace,
        DatasetManifest(
            id="d1", source="csv", buckets=0, parts=1, users=1, plays=2, songs=2, last_play=10 * 86_400_000
        ),
    )
    return workspace.uri


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["import", "csv", "/no/such/file.csv"], "file or folder /no/such/file.csv does not exist"),
        (["import", "csv", "nosuch"], "rayrec: (?-i:file or folder nosuch does not exist)"),
        (["import", "lastfm", "PLAYS"], "unknown format 'lastfm'; expected one of apple-music, csv"),
        (["import", "csv", "PLAYS", "--columns", "user=name"], "no column 'name'"),
        (["import", "csv", "PLAYS", "--columns", "user"], "--columns is 'user'; expected name = value pairs"),
        (["import"], "Missing argument FORMAT; see rayrec import --help"),
        (["import", "csv", "PLAYS", "--timezone", "Mars/Olympus"], "unknown time zone 'Mars/Olympus'; give an IANA"),
        (["inspect", "csv", "PLAYS", "--timezone", "Mars/Olympus"], "unknown time zone 'Mars/Olympus'; give an IANA"),
        (["fit", "PLAYS", "--timezone", "+02:00"], r"unknown time zone '\+02:00'; give an IANA"),
        (["import", "mpd", "PLAYS", "--timezone", "Asia/Tokyo"], "times in a known zone; omit --timezone"),
        (["import", "csv", "PLAYS", "--buckets", "many"], "'--buckets': 'many'|valid integer"),
        (["generate", "--users", "0"], "users is 0"),
        (["split"], "has no data set; run `rayrec import`"),
        (["--workspace", "FILLED", "split", "--test-days", "30"], "leave nothing to train on"),
        (
            ["--workspace", "FILLED", "split", "--held-out-users", "1"],
            "held_out_users is 1.0; expected a number",
        ),
        (["--workspace", "FILLED", "embed", "--split", "nope"], "split 'nope' not found in workspace"),
        (["embed", "--dim", "0"], "dim is 0"),
        (["train", "--objective", "guessing"], "expected one of sampled-softmax, softmax, cosine, l2"),
        (["taste"], "has no data set"),
        (["index", "--kind", "tree"], "expected one of auto, flat, ivf"),
        (["--workspace", "FILLED", "recommend", "--user", "ann"], "run `rayrec train` first"),
        (["--workspace", "FILLED", "recommend", "--user", "ann", "--at", "2015-01-20"], "no zone"),
        (["recommend", "--user", "ann", "-k", "0"], "k is 0"),
        (
            ["recommend", "--user", "ann", "--horizon", "far"],
            "horizon is 'far'; expected short, long, or a number from 0 to 1",
        ),
        (["recommend", "--user", "ann", "--horizon", "1.5"], "horizon is '1.5'; expected short, long, or a number"),
        (["evaluate"], "no data set"),
        (["--workspace", "FILLED", "evaluate"], "no split to evaluate on"),
        (["--workspace", "FILLED", "release", "create"], "data set d1 has no model"),
        (["status", "--workspace", ""], "The workspace is an empty text"),
        (["release", "activate", "nope"], "release 'nope' not found in workspace"),
        (["release", "rollback"], "no earlier release to roll back to"),
        (["release", "verify", "nope"], "release 'nope' not found in workspace"),
        (["fit", "/no/such.csv"], "file or folder /no/such.csv does not exist"),
        (["fit", "PLAYS", "--columns", "usr=user_id"], "unknown column role 'usr'"),
        (["fit", "PLAYS", "--settings", "/no/such.toml"], "/no/such.toml cannot be read"),
        (["--workspace", "FILLED", "update", "PLAYS"], "no live release; run `rayrec fit` first"),
        (["--workspace", "FILLED", "serve", "--port", "0"], "no live release; run `rayrec fit`"),
        (["run", "/no/such.toml"], "/no/such.toml cannot be read"),
        (["bench", "everything"], "No such command 'everything'"),
        (["bench", "serve", "--clients", "1,64"], r"clients is \[1, 64\]; expected integers that include 1 and 16"),
        (["--workspace", "PLAYS", "status"], "is a file; expected a folder"),
        (["--workspace", "gopher://host/x", "status"], "gopher"),
        (["--workspace", "FILLED", "demo"], "holds another data set"),
        (["status", "--loudly"], "No such option"),
        (["clean", "--keep", "0"], "keep is 0; expected an integer of at least 1"),
        (["clean", "--hours", "-1"], "hours is -1.0; expected a number of at least 0"),
        (["clean", "--hours", "1e308"], r"hours is 1e\+308; expected a number of at least 0 and at most 100000"),
        (
            ["plan", "--cluster", "c.yaml", "--users", "9", "--plays", "99", "--songs", "9223372036854775807"],
            r"songs is 9223372036854775807; expected an integer of at least 1 and at most 1e\+10",
        ),
        (
            ["plan", "--cluster", "c.yaml", "--users", "9", "--plays", "9223372036854775807", "--songs", "9"],
            r"plays is 9223372036854775807; expected an integer of at least 1 and at most 1e\+14",
        ),
        (
            ["plan", "--cluster", "c.yaml", "--users", "9223372036854775807", "--plays", "9", "--songs", "9"],
            r"users is 9223372036854775807; expected an integer of at least 1 and at most 1e\+10",
        ),
        (["forget", "--users", "nosuch"], "rayrec: (?-i:nosuch cannot be read)"),
        (["serve", "--port", "0", "--keys-file", "/no/keys"], "keys file /no/keys cannot be read"),
        (["serve", "--port", "0", "--access-log", "/no/log"], "/no/log"),
        (["serve", "--port", "0", "--host", "0.0.0.0"], "without API keys"),
        (["release", "activate", "r", "--timeout", "0"], "timeout is 0.0; expected a number above 0"),
        (["plan", "--cluster", "c.yaml", "--users", "3"], "--users, --plays and --songs belong together"),
        (["dance"], "No such command 'dance'"),
        (["release", "dance"], "No such command 'dance'"),
    ],
)
def test_wrong_use_is_one_clear_line_and_exit_code_2(
    arguments: list[str], message: str, plays: Path, filled: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {"PLAYS": str(plays), "FILLED": filled}
    words = [paths.get(item, item) for item in arguments]
    code = main([*([] if "--workspace" in words else ["--workspace", str(tmp_path / "empty")]), *words])
    captured = capsys.readouterr()
    assert code == 2, captured.err
    assert captured.out == ""
    assert captured.err.startswith("rayrec: ")
    assert captured.err.count("\n") == 1
    assert re.search(message, captured.err, re.IGNORECASE), captured.err


def test_the_file_of_a_pipeline_holds_the_settings_of_single_commands_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.toml"
    path.write_text("[import]\nformat = 'csv'\n[train]\nepochs = 0\n[retrieval]\n[rank]\ntrees = 5\n")
    assert main(["--workspace", str(tmp_path / "w"), "train", "--config", str(path)]) == 2
    assert "epochs is 0; expected an integer of at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["status", "split", "recommend --user ann", "evaluate", "train"])
def test_a_data_set_whose_manifest_is_cut_off_is_reported_as_damaged(
    command: str, filled: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(filled) / "dataset" / "dataset.json"
    path.write_bytes(path.read_bytes()[:40])
    assert main(["--json", "--workspace", filled, *command.split()]) == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["kind"] == "damaged_artifact"
    assert error["message"].startswith("dataset/dataset.json is not JSON")


@pytest.mark.parametrize("command", ["status", "verify", "release list", "unlock", "clean"])
def test_an_empty_workspace_is_wrong_use_and_stays_empty(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (tmp_path / "typo", tmp_path / "new"):
        assert main(["--json", "--workspace", str(folder), *command.split()]) == 2
        error = json.loads(capsys.readouterr().out)["error"]
        assert error["kind"] == "not_found"
        assert error["message"] == f"workspace {folder} is empty"
        assert error["hint"] == "check --workspace, or run `rayrec fit`"
        (tmp_path / "new").mkdir(exist_ok=True)
    assert not (tmp_path / "typo").exists()
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize("command", ["demo", "run /no/such.toml", "fit PLAYS", "update PLAYS", "serve"])
def test_without_faiss_nothing_is_started(
    command: str, plays: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    words = command.replace("PLAYS", str(plays)).split()
    assert main(["--workspace", str(tmp_path / "new"), *words]) == 2
    assert "pip install faiss-cpu" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_job_that_fails_is_exit_code_1(
    filled: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(workspace: Workspace) -> None:
        raise LeakError("a fit was handed\n3 plays")

    monkeypatch.setattr("rayrec_cli.operations_commands.workspace_status", fail)
    assert main(["--workspace", filled, "status"]) == 1
    assert capsys.readouterr().err == "rayrec: a fit was handed 3 plays\n"


def test_an_error_of_ours_that_ray_wrapped_is_printed_as_it_was_raised(
    filled: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class WrappedError(Exception):
        """Like Ray's RayTaskError: its text is the traceback, and `cause` is the error."""

        cause = NotFoundError("there is no such song")

    def fail(workspace: Workspace) -> None:
        raise WrappedError("Traceback\n  File x\nrayrec.errors.NotFoundError: there is no such song")

    monkeypatch.setattr("rayrec_cli.operations_commands.workspace_status", fail)
    assert main(["--workspace", filled, "status"]) == 2
    assert capsys.readouterr().err == "rayrec: there is no such song\n"


def test_our_bugs_are_one_line_and_a_traceback_only_on_request(
    filled: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(workspace: Workspace) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr("rayrec_cli.operations_commands.workspace_status", fail)
    monkeypatch.setenv("RAYREC_WORKSPACE", filled)
    assert main(["status"]) == 1
    assert capsys.readouterr().err == "rayrec: ZeroDivisionError: oh; run again with --debug for the traceback\n"
    assert main(["--debug", "status"]) == 1
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("RAYREC_DEBUG", "1")
    assert main(["status"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("raised", "error"),
    [
        (NotFoundError("no such song; check the id"), ("not_found", "no such song", "check the id", 2)),
        (LeakError("a fit was handed\n3 plays"), ("leak", "a fit was handed 3 plays", "", 1)),
        (DamagedInputError("x.gz is cut; a; fetch it"), ("damaged_input", "x.gz is cut; a", "fetch it", 2)),
        (ZeroDivisionError("oh"), ("internal", "ZeroDivisionError: oh", "run again with --debug for the traceback", 1)),
        (KeyboardInterrupt(), ("interrupted", "Interrupted", "", 130)),
    ],
)
@pytest.mark.parametrize("place", ["before", "after"])
def test_an_error_with_json_is_one_object_on_stdout_and_one_line_on_stderr(
    raised: BaseException,
    error: tuple[str, str, str, int],
    place: str,
    filled: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(workspace: Workspace) -> None:
        raise raised

    monkeypatch.setattr("rayrec_cli.operations_commands.workspace_status", fail)
    monkeypatch.setenv("RAYREC_WORKSPACE", filled)
    kind, message, hint, code = error
    assert main(["--json", "status"] if place == "before" else ["status", "--json"]) == code
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"error": {"kind": kind, "message": message, "hint": hint}}
    assert len(captured.err.splitlines()) == 1


def test_wrong_use_with_json_is_an_object_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json", "dance"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["kind"], error["hint"]) == ("usage", "see rayrec --help")


@pytest.mark.parametrize("words", [[], ["release"], ["songs"], ["states"], ["experiment"], ["bench"]])
def test_a_missing_command_with_json_is_an_object_too(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json", *words]) == 2
    captured = capsys.readouterr()
    hint = f"see {' '.join(['rayrec', *words])} --help"
    assert json.loads(captured.out)["error"] == {"kind": "usage", "message": "Missing command", "hint": hint}
    assert captured.err == f"rayrec: Missing command; {hint}\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_command_succeeds_where_stdout_cannot_encode_a_name(encoding: str, flags: list[str], tmp_path: Path) -> None:
    plays = tmp_path / "plays.csv"
    plays.write_text("user,song,played_at,title\n\N{SNOWMAN},s,1400000000,日本\n", encoding="utf-8")
    process = subprocess.run(
        [sys.executable, "-m", "rayrec_cli.main", *flags, "inspect", "csv", str(plays)],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )
    assert (process.returncode, process.stderr) == (0, b"")
    text = process.stdout.decode(encoding)
    if flags:
        assert [column["example"] for column in json.loads(text)["columns"]][::3] == ["\N{SNOWMAN}", "日本"]
    else:
        assert ("日本" if encoding == "utf-8" else "\\u65e5\\u672c") in text


def test_an_interrupt_is_exit_code_130(filled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(workspace: Workspace) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rayrec_cli.operations_commands.workspace_status", interrupt)
    assert main(["--workspace", filled, "status"]) == 130


def test_a_stopped_job_is_one_object_and_no_interrupt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class FakeCluster:
        """A cluster on which someone stopped the job."""

        def __init__(self, address: str | None) -> None:
            pass

        def follow(self, job: str, write: Any) -> JobEnd:
            return JobEnd(job=job, status="STOPPED", exit_code=STOPPED, message="", seconds=1.0)

    monkeypatch.setattr("rayrec.jobs.submit.Cluster", FakeCluster)
    assert main(["submit", "--json", "--attach", "job-1"]) == 130
    captured = capsys.readouterr()
    assert json.loads(captured.out)["status"] == "STOPPED"
    assert captured.err == ""


def test_files_in_object_storage_are_named_by_uris_that_can_be_opened(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = Manifest(kind="recommendations", id="r1", config={"at": 0, "k": 3})
    monkeypatch.setattr("rayrec_cli.recommend_commands.Dataset", lambda workspace: None)
    monkeypatch.setattr("rayrec_cli.recommend_commands.default_parts", lambda *arguments: {"models": "m"})
    monkeypatch.setattr("rayrec.jobs.recommend_all.recommend_all", lambda *arguments, **options: manifest)
    workspace = "s3://music/rayrec?region=us-east-1"
    assert main(["--json", "--workspace", workspace, "recommend", "--all"]) == 0
    folder = "s3://music/rayrec/recommendations/r1?region=us-east-1"
    assert json.loads(capsys.readouterr().out)["folder"] == folder
    assert Workspace(folder).root == "music/rayrec/recommendations/r1"


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "Commands:" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["before", "after"])
def test_status_as_json(place: str, filled: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--workspace", filled, "--json"]
    assert main([*flags, "status"] if place == "before" else ["status", *flags]) == 0
    status = json.loads(capsys.readouterr().out)
    assert status["dataset"]["plays"] == 2
    assert status["models"] == []
    assert status["active"] is None


def test_a_split_is_stored_and_shown(filled: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["split", "--test-days", "3", "--validation-days", "2", "--workspace", filled]
    assert main([*flags, "--json"]) == 0
    split = json.loads(capsys.readouterr().out)
    assert split["test_from"] == 7 * 86_400_000 + 1
    assert main(flags) == 0
    assert split["id"] in capsys.readouterr().out
    assert main(["status", "--workspace", filled]) == 0
    assert split["id"] in capsys.readouterr().out


def test_a_split_of_each_users_own_plays_says_that_it_is_the_weaker_one(
    filled: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["split", "--last-fraction", "0.2", "--workspace", filled]
    assert main([*flags, "--json"]) == 0
    split = json.loads(capsys.readouterr().out)
    assert (split["protocol"], split["last_fraction"], split["validation_fraction"]) == ("last-fraction", 0.2, 0.1)
    assert main(flags) == 0
    assert "weaker than a split in time" in capsys.readouterr().out
    assert main(["status", "--workspace", filled]) == 0
    assert "last-fraction" in capsys.readouterr().out


def test_the_workspace_can_be_named_by_the_environment(
    filled: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAYREC_WORKSPACE", filled)
    assert main(["status"]) == 0
    assert filled in capsys.readouterr().out.replace("\n", "")


def run_rayrec(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "rayrec_cli.main", *arguments], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("rayrec re", ["retrieval", "release", "recommend"]),
        ("rayrec release ro", ["rollback"]),
        ("rayrec train --obj", ["--objective"]),
        ("rayrec train --objective so", ["softmax"]),
    ],
)
def test_the_tab_key_completes_commands_options_and_choices(line: str, expected: list[str]) -> None:
    environment = {"_RAYREC_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    process = subprocess.run(
        [sys.executable, "-m", "rayrec_cli.main"], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout.split() == expected


def test_a_real_process_keeps_stdout_and_stderr_apart(filled: str) -> None:
    process = run_rayrec("status", "--json", "--workspace", filled)
    assert (process.returncode, process.stderr) == (0, "")
    assert json.loads(process.stdout)["dataset"]["id"] == "d1"
    failed_process = run_rayrec("status", "--json", "--workspace", "gopher://x")
    assert failed_process.returncode == 2
    assert json.loads(failed_process.stdout)["error"]["kind"] == "input"
    assert failed_process.stderr.startswith("rayrec: workspace gopher://x cannot be opened; ")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("output", ["closed pipe", "full disk"])
def test_an_output_that_cannot_be_written_is_at_most_one_line_and_exit_code_1(
    output: str, unbuffered: str, plays: Path
) -> None:
    if output == "closed pipe":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open("/dev/full", os.O_WRONLY)
    process = subprocess.run(
        [sys.executable, "-m", "rayrec_cli.main", "--json", "inspect", "csv", str(plays)],
        stdout=writer,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        text=True,
    )
    os.close(writer)
    error = "rayrec: the output cannot be written: No space left on device; write it to another place\n"
    assert (process.returncode, process.stderr) == (1, "" if output == "closed pipe" else error)


def help_text(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the help of every command, as a terminal of 80 columns shows it."""
    pages = []
    for words in [[], *([name] for name in COMMANDS), *([group, name] for group in GROUPS for name in GROUPS[group])]:
        assert main([*words, "--help"]) == 0
        pages.append(f"$ rayrec {' '.join([*words, '--help'])}\n{capsys.readouterr().out.strip()}\n")
    return "\n".join(pages)


def test_the_help_equals_the_stored_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("RAYREC_WORKSPACE", raising=False)
    text = help_text(capsys)
    if os.environ.get("RAYREC_STORE_HELP") == "1":
        HELP.write_text(text, encoding="utf-8")
    assert text == HELP.read_text(encoding="utf-8"), "where the change is meant: RAYREC_STORE_HELP=1 make test"


def test_every_command_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_text(capsys)
    pages = text.split("$ rayrec ")[1:]
    assert [page.splitlines()[0] for page in pages if "Example:" not in page] == [
        f"{group} --help" for group in ("release", "bench")
    ]
    assert all(len(line) <= 80 for line in text.splitlines())


@pytest.mark.parametrize("command", artifacts.COMMANDS.values())
def test_every_command_that_an_error_advises_to_make_an_artifact_exists(command: str) -> None:
    assert main([*command.split(), "--help"]) == 0
