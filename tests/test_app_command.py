"""The command that opens the app: to whom, with what limits, and that the server understands what it is told."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import pytest

pytest.importorskip("voila", reason="the extra 'app' is not installed")

from explorer import cli
from explorer.errors import ExplorerError
from explorer.widgets import serving
from explorer.widgets.serving import UserLimits, limits_for


def configured(*more: str) -> object:
    """Voila as the command starts it, up to where it would listen."""
    from voila.app import Voila

    command = serving.server_command(
        Path(cli.__file__), 9000, limits=UserLimits(3, 1, 2.5), token=True, host="127.0.0.2"
    )
    app = Voila()
    app.initialize([*command[3:], *more])
    return app


@pytest.mark.filterwarnings("ignore:.*dict-traits is deprecated:DeprecationWarning")
def test_the_server_reads_the_file_of_the_package_and_the_limits_of_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # A configuration that happens to lie where the command is given must not count.
    (tmp_path / "voila.json").write_text('{"VoilaConfiguration": {"show_tracebacks": true}}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JUPYTER_PATH", serving.server_environment({})["JUPYTER_PATH"])
    from explorer.widgets.user_kernels import UserKernels

    app = configured()
    assert (app.ip, app.port, app.port_retries, app.open_browser) == ("127.0.0.2", 9000, 0, False)
    assert app.auto_token is True
    assert app.tornado_settings["websocket_max_message_size"] == 200 * 2**20
    page = app.voila_configuration
    assert (page.template, page.allow_template_override, page.show_tracebacks) == ("explorer", "NO", False)
    assert page.multi_kernel_manager_class is UserKernels
    kernels = UserKernels(config=app.config)
    assert (kernels.max_users, kernels.threads, kernels.memory_gb) == (3, 1, 2.5)
    assert kernels.cull_idle_timeout == 60
    assert kernels.cull_connected is False
    # Seen absent, waited for, and looked at again: within a minute.
    silent = (app.tornado_settings["ws_ping_timeout"] + app.tornado_settings["ws_ping_interval"]) / 1000
    assert kernels.cull_interval + max(silent + kernels.absent_seconds, kernels.arrival_seconds) < 60
    assert app.identity_provider_class(config=app.config, token="").get_handlers() == []
    assert app.identity_provider_class(config=app.config).allow_password_change is False


def test_every_setting_of_the_file_is_one_that_the_server_knows() -> None:
    from jupyter_client.restarter import KernelRestarter
    from jupyter_server.auth.identity import PasswordIdentityProvider
    from voila.app import Voila
    from voila.configuration import VoilaConfiguration

    from explorer.widgets.user_kernels import UserKernels

    known = {
        each.__name__: each
        for each in (Voila, VoilaConfiguration, UserKernels, KernelRestarter, PasswordIdentityProvider)
    }
    settings = json.loads((serving.CONFIG / "voila.json").read_text())
    assert settings
    for name, values in settings.items():
        assert set(values) <= set(known[name].class_trait_names()), name


def test_without_being_told_the_app_is_for_this_machine_alone() -> None:
    settings = json.loads((serving.CONFIG / "voila.json").read_text())
    assert settings["Voila"]["ip"] == "127.0.0.1"
    command = serving.server_command(Path("app.ipynb"), 9000)
    assert command[:4] == [sys.executable, "-m", "voila", "app.ipynb"]
    assert "--Voila.ip=127.0.0.1" in command
    assert not any("token" in word for word in command)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "some-name"])
def test_others_are_let_in_with_a_token_only(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["app", "--no-browser", "--host", host]) == 2
    assert "add --token" in capsys.readouterr().err
    first, second = serving.checked_token(host, ""), serving.checked_token(host, "")
    assert len(first) > 30 and first != second
    assert serving.checked_token(host, "my-own-token") == "my-own-token"
    assert serving.checked_token("127.0.0.1", None) == ""


@pytest.mark.parametrize("token", ["short", "with space in it", "a&b=cdefgh", "größer-als-acht"])
def test_a_token_that_is_weak_or_breaks_the_address_is_refused(token: str) -> None:
    with pytest.raises(ExplorerError, match="at least 8 letters"):
        serving.checked_token("127.0.0.1", token)


def test_the_token_is_in_the_environment_of_the_server_and_of_nothing_else() -> None:
    command = serving.server_command(Path("app.ipynb"), 9000, host="0.0.0.0", token=True)
    assert "--Voila.auto_token=True" in command
    served = serving.server_environment({"JUPYTER_TOKEN": "of something else"}, "secret-token")
    assert served["JUPYTER_TOKEN"] == "secret-token"
    assert "JUPYTER_TOKEN" not in serving.server_environment({"JUPYTER_TOKEN": "of something else"})
    kernel = serving.kernel_environment({**served, "KEPT": "1"}, 2)
    assert "secret-token" not in kernel.values()
    assert (kernel["KEPT"], kernel["OMP_NUM_THREADS"], kernel["MKL_NUM_THREADS"]) == ("1", "2", "2")
    assert serving.address("10.0.0.1", 80, "abc") == "http://10.0.0.1:80/?token=abc"
    assert socket.gethostname() in serving.address("0.0.0.0", 80, "")


def test_users_and_memory_are_counted_by_what_the_machine_has() -> None:
    def found(**machine: object) -> tuple[int, float | None]:
        machine = {"machine_gb": 8.0, "cores": 8, "limits_memory": True, **machine}
        limits = limits_for(None, None, machine.pop("memory_gb", None), **machine)
        return limits.max_users, limits.memory_gb

    assert found() == (3, 2.1)
    assert found(machine_gb=3.0) == (1, 2.4)
    assert found(machine_gb=0.5) == (1, serving.LEAST_GB)
    assert found(cores=1, machine_gb=64.0) == (2, 25.6)
    assert found(machine_gb=500.0, cores=64) == (serving.MOST_USERS, 50.0)
    assert found(memory_gb=3.0) == (2, 3.0)
    assert found(limits_memory=False) == (3, None)
    assert found(machine_gb=None) == (serving.MOST_USERS, None)
    asked = limits_for(40, 2, 2.5, machine_gb=8.0, cores=2, limits_memory=True)
    assert asked == UserLimits(40, 2, 2.5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--memory-per-user", "0.2"], "needs 2 GB"),
        (["--memory-per-user", "nan"], "needs 2 GB"),
        (["--threads-per-user", "5000"], "CPUs; give at most that"),
        (["--host", "192.0.2.7", "--token"], "cannot listen on 192.0.2.7"),
    ],
)
def test_what_cannot_be_kept_is_said_before_a_server_starts(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "--memory-per-user" in arguments and not serving.can_limit_memory():
        words = "needs Linux"
    assert cli.main(["app", "--no-browser", "--port", "8899", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_limit_on_memory_that_the_system_does_not_keep_is_refused() -> None:
    with pytest.raises(ExplorerError, match="needs Linux"):
        limits_for(None, None, 2.0, machine_gb=8.0, cores=2, limits_memory=False)
    assert "memory that this system cannot limit" in serving.describe(UserLimits(1, None, None))


def test_the_folder_of_weights_goes_to_the_kernels_and_must_be_there(tmp_path: Path) -> None:
    served = serving.server_environment({}, weights_folder=str(tmp_path))
    assert served["SPARSITY_EXPLORER_WEIGHTS_FOLDER"] == str(tmp_path.resolve())
    assert "SPARSITY_EXPLORER_WEIGHTS_FOLDER" not in serving.server_environment({})
    assert serving.kernel_environment(served, 1)["SPARSITY_EXPLORER_WEIGHTS_FOLDER"] == str(
        tmp_path.resolve()
    )
    with pytest.raises(ExplorerError, match="There is no folder"):
        serving.server_environment({}, weights_folder=str(tmp_path / "none"))


def test_a_study_that_is_not_named_well_starts_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = f"--port={free.getsockname()[1]}"
    assert cli.main(["app", "--no-browser", port, "--study", "Ours"]) == 2
    assert "write LABEL=MODULE:FUNCTION" in capsys.readouterr().err
    assert cli.main(["app", "--no-browser", port, "--weights-folder", "/no/such"]) == 2
    assert "There is no folder /no/such" in capsys.readouterr().err
