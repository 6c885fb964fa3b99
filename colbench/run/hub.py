"""Files of the hub's data sets, and one line on why the hub gives a file or a model to nobody, or not to you."""
from colbench.run.errors import UserError


def download(dataset, file, source):
    """Local path of a data set's file; one fetched on an earlier day serves where the hub cannot be asked."""
    try:
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    except ImportError:
        raise UserError(f"{source}: no such file (for a hub data set: pip install huggingface_hub)") from None
    try:
        # One look without the client's retries, which take half a minute where there is no network.
        get_hf_file_metadata(hf_hub_url(dataset, file, repo_type="dataset"), timeout=10)
        return hf_hub_download(dataset, file, repo_type="dataset")
    except Exception as error:  # gated, renamed, no network, offline mode, proxy, disk: they share no class
        first_line = str(error).split("\n")[0][:160]
        reason = why_not(error, dataset, "datasets/") or f"{type(error).__name__}: {first_line}"
    try:
        return hf_hub_download(dataset, file, repo_type="dataset", local_files_only=True)  # fetched on an earlier day
    except Exception:  # not in the cache either: the first reason is the one to tell
        raise UserError(f"{source}: no such local file, and {reason}; or pass the path of a downloaded file") from None


def why_not(error, name, kind=""):
    """What keeps the hub from giving `name`, and what to do, or None if this is no error of the hub's.

    Looks at what caused the error too. kind: "datasets/", or "" for a model.
    """
    from huggingface_hub import constants, errors
    page, what = f"{constants.ENDPOINT}/{kind}{name}", "data set" if kind else "model"
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, errors.GatedRepoError):
            return f"{name} is gated: accept its terms at {page}, then `hf auth login`"
        if isinstance(error, errors.OfflineModeIsEnabled):
            return f"{name} was not fetched before, and HF_HUB_OFFLINE forbids to ask the hub"
        if isinstance(error, errors.RemoteEntryNotFoundError):
            return f"{name} has no such file; {page}/tree/main lists them"
        # without a token the hub does not tell which
        if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
            return f"the hub has no {what} {name}, or a private one: check the name, or `hf auth login`"
        if status == 403:
            return f"the hub refuses {name} (403): `hf auth login` with a token that may read it"
        if status is not None:
            return f"the hub answers {status} for {name}; try again later"
        if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is None and error.__context__ is None:
            return f"{name} was not fetched before, and the hub cannot be asked"
        if type(error).__name__ in ("ConnectError", "ConnectTimeout", "ReadTimeout", "ProxyError"):  # httpx's
            return f"{constants.ENDPOINT} does not answer, and {name} was not fetched before"
        error = error.__cause__ or error.__context__
    return None
