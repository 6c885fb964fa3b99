"""Run the scripts for tests, each in its own process.

It is forked from one that has already imported torch, so it starts at once."""
import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import namedtuple
from pathlib import Path

ROOT = Path(__file__).parent.parent
Done = namedtuple("Done", "returncode stdout stderr")
FORKER = """if True:
    import atexit, importlib, json, logging, os, resource, runpy, signal, sys
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    sys.path.insert(0, os.getcwd())
    for name in ("collect", "evaluate", "train_critic", "train_policy",
                 "colbench.env.frontend.environment", "openai", "peft",
                 "transformers.models.llama.modeling_llama"):
        importlib.import_module(name)

    def child(folder, output, script, arguments, file_size, environment, text):
        os.setsid()
        signal.alarm(600)
        os.chdir(folder)
        for number in range(3):
            mode = os.O_WRONLY if number else os.O_RDONLY
            os.dup2(os.open(f"{output}/{number}", mode), number)
        sys.stdin = open(0, closefd=False)
        os.environ.update(environment)
        if file_size:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
        try:
            skipped = 0 if script.endswith(".py") else 1  # the module of -m, the code of -c
            sys.argv = [script, *arguments[skipped:]]
            if script == "-c":
                exec(compile(arguments[0], "-c", "exec"), {"__name__": "__main__"})
            elif script == "-m":
                runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(script, run_name="__main__")
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        except KeyboardInterrupt:  # before the script handles it itself
            code = 130
        except BaseException:
            import traceback
            traceback.print_exc()
            code = 1
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # or Python reports a Ctrl-C during exit
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            child(*json.loads(line))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
_forker = _running = None


def start(script, *args, cwd=ROOT, file_size=0, text="", **environment) -> int:
    """Start a script, or `-m` MODULE, or `-c` CODE, one at a time; returns its process id.

    file_size: largest file that it may write, in bytes; 0: any. text: its stdin. environment:
    variables."""
    global _forker, _output, _running
    if not _forker:
        _output = tempfile.TemporaryDirectory(prefix="colbench-tests-")
        _forker = subprocess.Popen([sys.executable, "-c", FORKER], cwd=ROOT,
                                   env={**os.environ, "HF_HUB_OFFLINE": "1"},
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        atexit.register(_forker.stdin.close)
    if _running:  # left by a test that failed
        os.kill(_running, signal.SIGKILL)
        wait()
    for name, content in (("0", text), ("1", ""), ("2", "")):
        Path(_output.name, name).write_text(content)
    script = str(ROOT / script) if script.endswith(".py") else script
    request = [str(cwd), _output.name, script, [*map(str, args)], file_size, environment, text]
    _forker.stdin.write(json.dumps(request) + "\n")
    _forker.stdin.flush()
    _running = int(_forker.stdout.readline())
    return _running


def wait() -> Done:
    """Wait until the started process ends."""
    global _running
    code = int(_forker.stdout.readline())
    _running = None
    return Done(code, *(Path(_output.name, name).read_text() for name in "12"))


def run(script, *args, code=0, **settings) -> Done:
    """Run a script (see `start`) to its end; expects this exit code, or any if None."""
    start(script, *args, **settings)
    done = wait()
    assert code in (None, done.returncode), done.stdout[-1000:] + done.stderr[-3000:]
    return done


def refused(script, *args, **settings) -> str:
    """The error line, the last of stderr, of a script that refuses to run."""
    done = run(script, *args, code=2, **settings)
    assert "Traceback" not in done.stderr, done.stderr
    return done.stderr.strip().splitlines()[-1]


def lines(path) -> list:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]
