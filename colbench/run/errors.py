"""A user's mistake, or the machine's, told in one line; a bug keeps its traceback."""
import errno
import os
import sys

INTERRUPTED = "interrupted: the same command goes on from here"


class UserError(Exception):
    """Bad input or a setting that cannot work. The message is one line that says what is wrong and what to do."""


def run_main(main, out_of_memory="less memory is needed"):
    """Run main(). A user's error is one line on stderr and exit code 2, Ctrl-C is 130. Bugs keep their traceback.

    out_of_memory: what to do then. torch's error classes are told by name and text, so torch is not needed here.
    """
    for stream, errors in (sys.stdout, "replace"), (sys.stderr, "backslashreplace"):
        if hasattr(stream, "reconfigure"):  # a terminal without β shows a question mark, half a surrogate pair likewise
            stream.reconfigure(encoding=None if "utf" in stream.encoding.lower() else "ascii", errors=errors)
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        _leave(f"error: {error}", 2)
    except KeyboardInterrupt:
        _leave(INTERRUPTED, 130)
    except BrokenPipeError:  # the reader of a pipe (`| head`) went away: end as quietly as a C program does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + 13)
    except Exception as error:
        if _met_while_interrupted(error):
            _leave(INTERRUPTED, 130)
        reason = _outer_cause(error, out_of_memory)
        if reason is None:
            raise
        _leave(f"error: {reason}", 2)


def _met_while_interrupted(error):
    """Whether it is what a library stumbled over when Ctrl-C came, such as torch.save with half a file."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__context__
    return False


def _outer_cause(error, out_of_memory):
    """One line on an error that is the machine's and no bug's (disk, rights, memory), else None."""
    disk = errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EACCES, errno.EROFS
    if isinstance(error, OSError) and error.errno in disk:
        return f"{error.filename or 'output'}: {error.strerror}"
    words = " ".join(str(error).split())
    if "No space left on device" in words or "File too large" in words:  # safetensors tells it in its own class
        return f"output: {words[:200]}; the same command goes on once there is room"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in words:
        return f"out of memory: {out_of_memory}; the same command then goes on from here"
    return error.__context__ and _outer_cause(error.__context__, out_of_memory)  # torch.save trips over the first error


def _leave(message, code):
    bars = sys.modules["tqdm"].tqdm._instances if "tqdm" in sys.modules else ()
    for bar in list(bars):  # so that the message has a line of its own
        bar.close()
    print(" ".join(message.split()), file=sys.stderr)
    sys.exit(code)
