"""Download data set files from the hub, and explain in one line why the hub refuses something."""
from colbench.run.errors import UserError


def download(dataset, file, source):
    """Local path of a data set's file, from the cache if the hub cannot be reached."""
    try:
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    except ImportError:
        raise UserError(f"{source}: no such file "
                        "(for a hub data set: pip install huggingface_hub)") from None
    try:
        # Ask once without the client's retries, which take half a minute without a network.
        get_hf_file_metadata(hf_hub_url(dataset, file, repo_type="dataset"), timeout=10)
        return hf_hub_download(dataset, file, repo_type="dataset")
    except Exception as error:  # gated, renamed, no network, offline, proxy, disk: no common class
        first_line = str(error).split("\n")[0][:160]
        reason = why_not(error, dataset, "datasets/") or f"{type(error).__name__}: {first_line}"
    try:
        return hf_hub_download(dataset, file, repo_type="dataset", local_files_only=True)
    except Exception:  # not in the cache either: report the first reason
        raise UserError(f"{source}: no such local file, and {reason}; "
                        "or pass the path of a downloaded file") from None


def why_not(error, name, kind=""):
    """Why the hub refuses `name` and what to do, or None if the error is not the hub's.

    Looks at the causes of the error too. kind: "datasets/", or "" for a model.
    """
    from huggingface_hub import constants, errors
    page = f"{constants.ENDPOINT}/{kind}{name}"
    what = "data set" if kind else "model"
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, errors.GatedRepoError):
            return f"{name} is gated: accept its terms at {page}, then `hf auth login`"
        if isinstance(error, errors.OfflineModeIsEnabled):
            return f"{name} was not fetched before, and HF_HUB_OFFLINE forbids asking the hub"
        if isinstance(error, errors.RemoteEntryNotFoundError):
            return f"{name} has no such file; {page}/tree/main lists them"
        # without a token the hub does not say which
        if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
            return (f"the hub has no {what} {name}, or a private one: "
                    "check the name, or `hf auth login`")
        if status == 403:
            return f"the hub refuses {name} (403): `hf auth login` with a token that may read it"
        if status is not None:
            return f"the hub answers {status} for {name}; try again later"
        cause = error.__cause__ or error.__context__
        if isinstance(error, errors.LocalEntryNotFoundError) and cause is None:
            return f"{name} was not fetched before, and the hub cannot be reached"
        # httpx's
        if type(error).__name__ in ("ConnectError", "ConnectTimeout", "ReadTimeout", "ProxyError"):
            return f"{constants.ENDPOINT} does not answer, and {name} was not fetched before"
        error = cause
    return None
