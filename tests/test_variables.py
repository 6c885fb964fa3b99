"""Environment variables that libraries read: they change no result and cause no traceback."""
import io
import json
import os
import subprocess
import sys

import pytest

from colbench.lm.server import ServerChat
from colbench.run.errors import UserError, run_main
from colbench.run.variables import settle
from stages import ROOT, lines, refused, run
from test_server import Server

LEFT = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4", "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
        "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_TORCH_DEVICE": "meta",
        "ACCELERATE_USE_CPU": "perhaps", "ACCELERATE_LOG_LEVEL": "loud",
        "ACCELERATE_ENABLE_RICH": "perhaps", "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
        "TQDM_NCOLS": "wide", "TQDM_BAR_FORMAT": "{none}", "HF_HUB_DOWNLOAD_TIMEOUT": "10s",
        "HF_HUB_ETAG_TIMEOUT": "", "TORCH_LOGS": "loud", "TORCH_LOGS_OUT": "/nowhere/x",
        "TORCH_LOGS_FORMAT": "x", "TORCH_DISTRIBUTED_DEBUG": "loud"}
ELSE = {"PYTHONIOENCODING": "ascii", "PYTHONWARNINGS": "error", "PYTHONHASHSEED": "7",
        "COLUMNS": "1", "TERM": "dumb", "TRANSFORMERS_VERBOSITY": "loud",
        "HF_HUB_OFFLINE": "perhaps", "HF_ENDPOINT": "nowhere", "TMPDIR": "/nowhere",
        "HF_HOME": "/proc/nowhere", "SSL_CERT_FILE": "/nowhere", "REQUESTS_CA_BUNDLE": "/nowhere",
        "HTTP_PROXY": "::", "ALL_PROXY": "socks5://127.0.0.1:1080", "CUDA_VISIBLE_DEVICES": "none",
        "WORLD_SIZE": "4", "USE_TORCH": "0"}


def test_harmful_variables_are_removed(monkeypatch):
    stays = {"ACCELERATE_USE_CPU": "TRUE", "TORCH_DISTRIBUTED_DEBUG": "detail",
             "TQDM_DISABLE": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "30", "HF_HOME": "/x",
             "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "29500"}
    monkeypatch.setattr(os, "environ",
                        LEFT | {"TORCH_LOGS": "+dynamo"} | stays | {"HF_HUB_ETAG_TIMEOUT": "x"})
    settle()
    assert os.environ == stays


@pytest.mark.slow
def test_variables_of_a_profile_do_not_change_training(tmp_path):
    """A training with all of them set equals one without."""
    rows = [{"id": f"t{k}", "sample": 0, "turn": 1, "candidates": ["a?", "b?"],
             "advantages": [1.0, -1.0],
             "messages": [{"role": "system", "content": "Ask."},
                          {"role": "user", "content": f"Write f{k}."}]}
            for k in range(6)]
    (tmp_path / "preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--preferences", tmp_path / "preferences.jsonl",
             "--epochs", "1", "--batch-size", "4", "--run"]
    run("train_policy.py", *flags, tmp_path / "plain")
    done = subprocess.run(
        [sys.executable, "train_policy.py", *map(str, flags), str(tmp_path / "β")], cwd=ROOT,
        env={**os.environ, **LEFT, **ELSE}, capture_output=True)
    assert done.returncode == 0 and b"?" in done.stdout, done.stderr[-2000:]
    plain, with_them = (
        [{name: row[name] for name in ("loss", "grad_norm", "margin")}
         for row in lines(tmp_path / folder / "policy_log.jsonl")] for folder in ("plain", "β"))
    assert plain == with_them and plain[0]["grad_norm"] > 0


@pytest.mark.parametrize("left, names", [
    ({"LOCAL_RANK": "0"}, "LOCAL_RANK"), ({"LOCAL_RANK": "first"}, "LOCAL_RANK"),
    ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}, "RANK, LOCAL_RANK, WORLD_SIZE")])
def test_an_incomplete_set_of_launcher_variables_is_named(tmp_path, left, names):
    error = refused("train_policy.py", "--run", tmp_path, **left)
    assert error.startswith(f"error: {names}: a launcher sets all of ")


@pytest.mark.parametrize("encoding, shown", [
    ("ascii", b"? ? ? ?\n"), ("latin-1", b"? ? ? ?\n"),
    ("cp437", b"? ? ? ?\n"), ("utf-8", "β ? · é\n".encode()),
    ("utf-16-le", "β ? · é\n".encode("utf-16-le"))])
def test_any_terminal_can_be_written_to(monkeypatch, encoding, shown):
    """Readers of a pipe expect UTF-8 or ASCII: other encodings get ASCII."""
    output = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", output)
    run_main(lambda: print("β \ud800 · é"))
    assert output.buffer.getvalue() == shown


# ---- model servers


@pytest.fixture
def variables(monkeypatch):
    for name in [*os.environ]:
        if name.upper().endswith("_PROXY") or name.startswith(("OPENAI_", "SSL_CERT_")):
            monkeypatch.delenv(name)
    return lambda values: [monkeypatch.setenv(*pair) for pair in values.items()]


def said(address):
    chat = ServerChat(address, timeout=3, max_retries=0)
    return chat.sample([[{"role": "user", "content": "x"}]], [[1]])[0][0].text


@pytest.mark.parametrize("values", [
    {"ALL_PROXY": "socks5://127.0.0.1:1080"}, {"http_proxy": "http://127.0.0.1:1"},
    {"HTTP_PROXY": "gopher://u:p@x"}, {"https_proxy": "::::"}, {"NO_PROXY": "[::1,*,:"},
    {"SSL_CERT_FILE": "/nowhere"}, {"SSL_CERT_DIR": "/nowhere"}, {"REQUESTS_CA_BUNDLE": "/nowhere"},
    {"OPENAI_BASE_URL": "http://127.0.0.1:1"}, {"OPENAI_LOG": "loud"},
    {"OPENAI_CUSTOM_HEADERS": "X-A: b c \n X-B : d\n"}, {"OPENAI_ORG_ID": "org"},
    {"OPENAI_CUSTOM_HEADERS": "none"}, {"OPENAI_ADMIN_KEY": "key"}])
def test_a_local_server_is_reached(variables, values):
    server = Server()
    try:
        variables(values)
        assert said(server.url) == said(server.url.replace("127.0.0.1", "localhost")) == "hello"
    finally:
        server.close()


def test_a_remote_server_is_reached_through_the_proxy(variables):
    proxy = Server()
    try:
        variables({"HTTP_PROXY": proxy.url, "NO_PROXY": "other.invalid"})
        assert said("http://model.invalid/v1#m") == "hello"
        assert proxy.path == "http://model.invalid/v1/chat/completions"
        with pytest.raises(UserError, match="http://other.invalid/v1: no answer"):
            ServerChat("http://other.invalid/v1", timeout=1, max_retries=0).check()
    finally:
        proxy.close()


@pytest.mark.parametrize("values, names", [
    ({"ALL_PROXY": "socks5://u:pass-word@127.0.0.1:1080"}, "ALL_PROXY"),
    ({"https_proxy": "::::"}, "https_proxy"),
    ({"HTTP_PROXY": "gopher://u:pass-word@x"}, "HTTP_PROXY"),
    ({"SSL_CERT_FILE": "/nowhere"}, "SSL_CERT_FILE=/nowhere"),
    ({"OPENAI_API_KEY": "pass-word "}, "OPENAI_API_KEY"),
    ({"OPENAI_API_KEY": "  "}, "OPENAI_API_KEY"),
    ({"OPENAI_ORG_ID": "\torg"}, "OPENAI_ORG_ID"),
    ({"OPENAI_CUSTOM_HEADERS": "Bad Name: pass-word"}, "OPENAI_CUSTOM_HEADERS"),
    ({"OPENAI_CUSTOM_HEADERS": "X-A: b\n: pass-word"}, "OPENAI_CUSTOM_HEADERS"),
    ({"OPENAI_API_KEY": "pass-word\n"}, "OPENAI_API_KEY"),
    ({"OPENAI_PROJECT_ID": "é"}, "OPENAI_PROJECT_ID")])
def test_a_value_that_the_client_cannot_use_is_named(variables, values, names):
    variables(values)
    with pytest.raises(UserError) as caught:
        ServerChat("http://192.0.2.1:8000/v1")
    assert str(caught.value).startswith(f"{names}: ") and "pass-word" not in str(caught.value)
