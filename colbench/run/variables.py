"""Remove harmful environment variables before libraries read them.

Launchers, profiles or other projects leave them. Some silently change results: with
ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4 accelerate divides every gradient by 4. Others make an
import fail, such as a TQDM_NCOLS that is not a number. Only flags control what these variables
set. `import colbench` removes them, since libraries read variables while they are imported.
"""
import os
import re
import ssl
from urllib.request import proxy_bypass_environment

from colbench.run.errors import UserError

TRUTH = {"y", "yes", "t", "true", "on", "1", "n", "no", "f", "false", "off", "0"}
# a launcher's RANK, WORLD_SIZE, MASTER_ADDR, ... stay
LAUNCHERS = (
    "ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_", "TQDM_", "TORCH_LOGS")
STAY = {"ACCELERATE_USE_CPU", "TQDM_DISABLE"}


def settle() -> None:
    """Remove harmful variables from the environment of this process and of those it starts."""
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
    """An OpenAI HTTP client for the model server at `address` (urlsplit's parts).

    Proxy variables apply only to other machines, and not to hosts in NO_PROXY; certificate
    variables always apply. UserError, naming the variable, for a value that cannot be used.
    """
    import openai
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_CUSTOM_HEADERS"):
        value = os.environ.get(name, "")
        lines = value.split("\n") if name == "OPENAI_CUSTOM_HEADERS" else [f"{name}:{value}"]
        for header, _, content in (line.partition(":") for line in lines if ":" in line):
            if not (content.isascii() and content.isprintable()):
                raise UserError(f"{name}: contains a character that HTTP headers do not allow, "
                                "such as a line break; remove it")
            if name != "OPENAI_CUSTOM_HEADERS" and content != content.strip():
                raise UserError(f"{name}: begins or ends with a blank; remove it")
            if not re.fullmatch(r"[-!#$%&'*+.^`|~\w]+", header.strip(), re.ASCII):
                raise UserError(f"{name}: contains an invalid HTTP header name; correct it")
    host = address.hostname
    local = host.endswith("localhost") or re.fullmatch(r"127\.[0-9.]+|0\.0\.0\.0|::1", host)
    file, folder = os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")
    try:
        if local or proxy_bypass_environment(host):
            settings["trust_env"] = False  # then the client ignores the certificates too
            if address.scheme == "https" and (file or folder):
                settings["verify"] = ssl.create_default_context(
                    cafile=file or None, capath=folder or None)
        return openai.DefaultHttpxClient(**settings)
    except OSError as error:
        raise UserError(f"SSL_CERT_FILE={file}: {error.strerror}; correct or unset it") from None
    except Exception as error:  # unknown proxy, missing package, bad address: no common class
        names = [name for name in os.environ
                 if re.fullmatch("(HTTP|HTTPS|ALL)_PROXY", name.upper())]
        if not names:
            raise
        # other errors may quote a password
        reason = f" ({error})" if isinstance(error, ImportError) else ""
        raise UserError(f"{', '.join(names)}: cannot be used as a proxy for {host}{reason}; "
                        "correct or unset it, or name the host in NO_PROXY") from None
