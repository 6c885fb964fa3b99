"""Report a user's mistake, or the machine's, in one line; a bug keeps its traceback."""
import errno
import os
import sys

INTERRUPTED = "interrupted: run the same command to resume"


class UserError(Exception):
    """Bad input or settings. The message is one line: what is wrong and what to do."""


def run_main(main, out_of_memory="use less memory"):
    """Run main(). A user's error is one line on stderr and exit code 2; Ctrl-C is exit code 130.

    out_of_memory: what to do about it. Recognises torch's errors by name and text: no torch import.
    """
    for stream, errors in (sys.stdout, "replace"), (sys.stderr, "backslashreplace"):
        if hasattr(stream, "reconfigure"):  # a terminal without β, or half a surrogate pair: "?"
            encoding = None if "utf" in stream.encoding.lower() else "ascii"
            stream.reconfigure(encoding=encoding, errors=errors)
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        _exit(f"error: {error}", 2)
    except KeyboardInterrupt:
        _exit(INTERRUPTED, 130)
    except BrokenPipeError:  # a pipe's reader (`| head`) is gone: end quietly, as C programs do
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + 13)
    except Exception as error:
        if _caused_by_interrupt(error):
            _exit(INTERRUPTED, 130)
        reason = _machine_error(error, out_of_memory)
        if reason is None:
            raise
        _exit(f"error: {reason}", 2)


def _caused_by_interrupt(error):
    """Whether Ctrl-C made a library fail, such as torch.save with half a file."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__context__
    return False


def _machine_error(error, out_of_memory):
    """One line on an error of the machine (disk, permissions, memory), None for a bug."""
    disk = errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EACCES, errno.EROFS
    if isinstance(error, OSError) and error.errno in disk:
        return f"{error.filename or 'output'}: {error.strerror}"
    words = " ".join(str(error).split())
    if "No space left on device" in words or "File too large" in words:  # safetensors' own class
        return f"output: {words[:200]}; make room, then run the same command to resume"
    if (isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
            or "DefaultCPUAllocator" in words):
        return f"out of memory: {out_of_memory}; then run the same command to resume"
    # torch.save raises another error after the first one
    return error.__context__ and _machine_error(error.__context__, out_of_memory)


def _exit(message, code):
    bars = sys.modules["tqdm"].tqdm._instances if "tqdm" in sys.modules else ()
    for bar in list(bars):  # so that the message gets its own line
        bar.close()
    print(" ".join(message.split()), file=sys.stderr)
    sys.exit(code)
