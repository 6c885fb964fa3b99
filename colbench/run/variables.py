"""Variables that a launcher, a profile or another project left in the environment, settled before libraries read them.

Some change results without a word: with ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4 accelerate divides every gradient by
4. Others end a library's import in a traceback, such as a TQDM_NCOLS that is no number. The scripts settle all of this
by flags or not at all. `import colbench` does it, since libraries read variables while they are imported.
"""
import os
import re
import ssl
from urllib.request import proxy_bypass_environment

from colbench.run.errors import UserError

TRUTH = {"y", "yes", "t", "true", "on", "1", "n", "no", "f", "false", "off", "0"}
# which processes there are (RANK, WORLD_SIZE, MASTER_ADDR, ...) stays as a launcher says
LAUNCHERS = ("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_", "TQDM_", "TORCH_LOGS")
STAY = {"ACCELERATE_USE_CPU", "TQDM_DISABLE"}


def settle() -> None:
    """Take out of this process's environment, and of those it starts, what would do harm."""
    for name, value in [*os.environ.items()]:
        if name in STAY:
            harm = value.lower() not in TRUTH
        elif name == "TORCH_DISTRIBUTED_DEBUG":
            harm = value.upper() not in ("OFF", "INFO", "DETAIL")
        elif name.startswith("HF_") and name.endswith("_TIMEOUT"):
            harm = not value.isdecimal()
        else:
            harm = name.startswith(LAUNCHERS)
        if harm:
            del os.environ[name]


def http_client(address, **settings):
    """An HTTP client for the model server at `address` (urlsplit's parts), as openai makes it.

    Proxies that variables name count for servers elsewhere, not for one on this machine, nor for a host that NO_PROXY
    names; certificates count where there are any. UserError, naming the variable, for a value that cannot be used.
    """
    import openai
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_CUSTOM_HEADERS"):
        value = os.environ.get(name, "")
        lines = value.split("\n") if name == "OPENAI_CUSTOM_HEADERS" else [f"{name}:{value}"]
        for header, _, content in (line.partition(":") for line in lines if ":" in line):
            if not (content.isascii() and content.isprintable()):
                raise UserError(f"{name}: holds a character that no HTTP header can have, such as a line's end")
            if name != "OPENAI_CUSTOM_HEADERS" and content != content.strip():
                raise UserError(f"{name}: has a blank at its beginning or end; take it out")
            if not re.fullmatch(r"[-!#$%&'*+.^`|~\w]+", header.strip(), re.ASCII):
                raise UserError(f"{name}: one of its headers has a name that no HTTP header can have")
    host = address.hostname
    here = host.endswith("localhost") or re.fullmatch(r"127\.[0-9.]+|0\.0\.0\.0|::1", host)
    file, folder = os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")
    try:
        if here or proxy_bypass_environment(host):
            settings["trust_env"] = False  # the client then forgets the certificates too
            if address.scheme == "https" and (file or folder):
                settings["verify"] = ssl.create_default_context(cafile=file or None, capath=folder or None)
        return openai.DefaultHttpxClient(**settings)
    except OSError as error:
        raise UserError(f"SSL_CERT_FILE={file}: {error.strerror}; correct or unset it") from None
    except Exception as error:  # an unknown kind of proxy, no package for it, no address: they share no class
        names = ", ".join(name for name in os.environ if re.fullmatch("(HTTP|HTTPS|ALL)_PROXY", name.upper()))
        if not names:
            raise
        reason = f" ({error})" if isinstance(error, ImportError) else ""  # others may quote a password
        raise UserError(f"{names}: no proxy that can be used for {host}{reason}; correct or unset it, or name the host "
                        "in NO_PROXY") from None
