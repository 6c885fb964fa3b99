"""Measure the 8B path on a GPU, unattended, offline, in less than nine minutes on an H100.

    python tests/gpu/run.py OUT                       # all parts, then the table
    python tests/gpu/run.py OUT --wheels DIR          # first install missing packages from DIR
    python tests/gpu/run.py OUT --smoke               # small sizes, also on a CPU, two minutes
    python tests/gpu/run.py OUT --only step,sample    # some parts

Weights are random and made on the GPU. The machine must have torch, transformers, peft and
accelerate; other packages come as wheels from DIR (default: `wheels` next to the repository) and go
to a temporary folder. For Python 3.12 on Linux:

    pip download --no-deps --only-binary=:all: --python-version 3.12 \
        --platform manylinux_2_24_x86_64 --platform any -d ../wheels \
        bitsandbytes==0.50.2 trl==1.16.0 datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19

Parts, most important first, each in a process with its own time limit:
 correct     packed log-probs against one by one, gradients, greedy sampling against generate,
             adapters off, NF4
 step        a critic's and a policy's step with π_ref's pass on Llama-3.1-8B in NF4: measured and
             computed memory, tokens/s, FLOP/s as a share of a measured bf16 matrix product, the
             three largest costs
 sample      1k-token prompts against generate: 64 dialogues; 8 states and 1 with 16 candidates
 scripts     the four scripts on the embedded model, in 4-bit and plain, with the table
 dpo         step-level DPO against TRL's best setting, 8B shape with four layers: equal losses in
             float32, then speed
 continuous  sampling of 8 states by continuous batching; last, since it may hang the GPU
Rows are appended to OUT/results.jsonl; OUT/PART.log is a part's output. Exit code 1 if one failed.
"""
import argparse
import contextlib
import functools
import importlib.metadata
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "bench")]
# seconds per part at most, and for all parts together; most take far less than their limit
LIMITS = {"correct": 140, "step": 160, "sample": 120, "scripts": 220, "dpo": 90, "continuous": 45}
ALL = 530
RANDOM_IDS = random.Random(0)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for results.jsonl and logs")
    parser.add_argument("--smoke", action="store_true", help="small sizes")
    parser.add_argument("--wheels", type=Path, default=ROOT.parent / "wheels")
    parser.add_argument("--only", default=",".join(LIMITS), help="parts, separated by commas")
    parser.add_argument("--part", choices=LIMITS, help=argparse.SUPPRESS)  # run in this process
    args = parser.parse_args()
    if not {*args.only.split(",")} <= {*LIMITS}:
        parser.error(f"--only {args.only}: parts are {', '.join(LIMITS)}")
    if args.part:
        return Part(args.out, args.part, args.smoke).run()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    patience = 4 if args.smoke else 1  # a smoke test may run on a busy machine
    results = args.out / "results.jsonl"
    end = time.monotonic() + ALL * patience
    results.write_text("")
    with tempfile.TemporaryDirectory() as site:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1",
                       "TOKENIZERS_PARALLELISM": "false"}
        if install(args.wheels, site):
            paths = [site, *filter(None, [os.environ.get("PYTHONPATH")])]
            environment["PYTHONPATH"] = os.pathsep.join(paths)
        for part in args.only.split(","):
            start, log = time.monotonic(), args.out / f"{part}.log"
            command = [sys.executable, __file__, str(args.out), "--part", part]
            command += ["--smoke"] * args.smoke
            limit = min(LIMITS[part] * patience, end - start)
            error = "no time left" if limit < 10 else run(command, log, limit, environment)
            if error:
                with results.open("a") as file:
                    file.write(json.dumps({"part": part, "what": "failed", "error": error}) + "\n")
            print(f"{part}: {time.monotonic() - start:.0f} s {error}", flush=True)
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    print_table(rows)
    sys.exit(any("error" in row for row in rows))


def install(wheels: Path, site: str) -> bool:
    """Install wheels of missing packages into the folder `site`; whether it installed any."""
    def missing(wheel):
        try:
            return not importlib.metadata.version(wheel.name.split("-")[0])
        except importlib.metadata.PackageNotFoundError:
            return True
    needed = [str(wheel) for wheel in sorted(wheels.glob("*.whl")) if missing(wheel)]
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps",
           "--target", site]
    return bool(needed) and not subprocess.run([*pip, *needed]).returncode


def run(command, log: Path, limit: float, environment) -> str:
    """Run a part. Returns "" or one line on why it failed; kills everything it started."""
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
                                   env=environment, start_new_session=True)
        try:
            code = process.wait(timeout=max(1, limit))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            with contextlib.suppress(subprocess.TimeoutExpired):  # it may hang in the driver
                process.wait(timeout=20)
    if code == 0:
        return ""
    if code is None:
        return f"time limit of {limit:.0f} s"
    last = (log.read_text(errors="replace").strip().splitlines() or [""])[-1][:200]
    return f"exit code {code}: {last}"


def print_table(rows: list[dict]) -> None:
    """Print the machine and the rows as a markdown table."""
    machines = [row["machine"] for row in rows if "machine" in row]
    print("\n" + (machines[0] if machines else "no part started"))
    print("\n| part | what | measured | note | target |\n|---|---|---|---|---|")
    for row in rows:
        if "error" in row:
            measured = f"failed: {row['error']}"
        else:
            measured = f"{row['value']:,.4g} {row['unit']}"
        target = ""
        if row.get("target"):
            target = f"{row['target']}: {'met' if row['met'] else 'NOT met'}"
        cells = [row["part"], row["what"], measured, row.get("note", ""), target]
        print("| " + " | ".join(str(cell).replace("|", "/").strip() for cell in cells) + " |")


def ids(n: int, vocabulary: int) -> list[int]:
    return [RANDOM_IDS.randrange(vocabulary) for _ in range(n)]


class Part:
    """One part in its own process.

    `row` writes a measurement; `attempt` records a failure and continues.
    """

    def __init__(self, out: Path, name: str, smoke: bool):
        import torch

        from colbench.lm.load import prepare_machine
        prepare_machine()
        self.out, self.name, self.smoke, self.torch = out, name, smoke, torch
        self.cuda = torch.cuda.is_available()
        self.device = "cuda" if self.cuda else "cpu"
        import transformers
        device = torch.cuda.get_device_name() if self.cuda else "CPU"
        self.machine = (f"{device}, torch {torch.__version__}, "
                        f"transformers {transformers.__version__}" + ", smoke test" * smoke)

    def run(self):
        getattr(self, self.name)()
        sys.stdout.flush()
        os._exit(0)  # does not wait for libraries' threads; failures have their rows

    def write(self, **row):
        with (self.out / "results.jsonl").open("a") as file:
            file.write(json.dumps({"part": self.name, **row, "machine": self.machine}) + "\n")

    def row(self, what: str, value: float, unit="", note="", at_most=None, at_least=None):
        """A row of the table. at_most, at_least: the target."""
        target = {}
        if at_most is not None:
            target = {"target": f"at most {at_most:g}", "met": value <= at_most}
        elif at_least is not None:
            target = {"target": f"at least {at_least:g}", "met": value >= at_least}
        self.write(what=what, value=float(value), unit=unit, note=note, **target)

    def attempt(self, what: str, function):
        try:
            function()
        except (Exception, SystemExit) as error:
            import traceback
            traceback.print_exc()
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self.write(what=what, error=reason[:200])

    def timed(self, function):
        """(result, seconds, peak CUDA memory in GB)."""
        if self.cuda:
            self.torch.cuda.synchronize()
            self.torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        result = function()
        if self.cuda:
            self.torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        peak = self.torch.cuda.max_memory_allocated() / 1e9 if self.cuda else 0.0
        return result, seconds, peak

    def largest_costs(self, what: str, function):
        """A row with the three slowest operations of `function`; call it once before."""
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile
        activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * self.cuda]
        with profile(activities=activities) as profiler:
            _, seconds, _ = self.timed(function)
        cost = {event.key: event.self_device_time_total if self.cuda else event.self_cpu_time_total
                for event in profiler.key_averages() if event.device_type == DeviceType.CPU}
        largest = sorted(cost, key=cost.get)[:-4:-1]
        total = sum(cost.values())
        busy = total / 1e6
        shares = ", ".join(f"{name} {cost[name] / 1e6 / busy:.0%}" for name in largest)
        self.row(f"{what}: three largest costs",
                 100 * sum(cost[name] for name in largest) / max(1, total), "%",
                 f"{shares}; the device is busy {busy:.3g} s of {seconds:.3g} s under the profiler")

    # ---------------------------------------------------------------- correct

    def correct(self):
        torch, small = self.torch, self.smoke
        from critic_scoring import plain
        from sampling import generate, ours
        from transformers import LlamaConfig, LlamaForCausalLM

        from colbench.lm import attention
        from colbench.lm.adapters import adapters_off, add_lora
        from colbench.lm.load import load_model, load_tokenizer
        from colbench.lm.logps import Tree, message_logps
        from colbench.lm.sampling import LocalChat
        vocabulary, scale = 2048, 1 if small else 8
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=vocabulary, hidden_size=256, intermediate_size=704,
                             num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2,
                             initializer_range=0.05)
        base = LlamaForCausalLM(config).to(self.device).eval()
        trees = [Tree(ids(60 * scale, vocabulary), [(20, 31), (50, 60)], []),
                 Tree(ids(40 * scale, vocabulary), [],
                      [ids(n, vocabulary) for n in (9, 1, 17)]),
                 Tree(ids(30 * scale, vocabulary), [(5, 9)], [ids(6, vocabulary)])]

        def together(model):
            return torch.cat([message for tree in message_logps(model, trees) for message in tree])

        def alone(model):
            rows = []
            for trunk, spans, leaves in trees:
                messages = [(trunk[:a], trunk[a:b]) for a, b in spans]
                messages += [(trunk, leaf) for leaf in leaves]
                for prompt, message in messages:
                    rows += plain(model, prompt, [message])
            return torch.cat(rows)

        def apart(one, other):
            return (one - other).abs().max().item()

        def adapters():
            with torch.no_grad():
                ref_logps = together(base)
            model = add_lora(base, 16, gradient_checkpointing=True).train()
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.05)
            with torch.no_grad(), adapters_off(model):
                # the base's head was trainable, so sums are in another order
                self.row("adapters off against the base model", apart(together(model), ref_logps),
                         "nats", at_most=1e-5)
            gradients = []
            for method in (together, alone):
                model.zero_grad()
                logps = method(model)
                logps.sum().backward()
                trained = [p for p in model.parameters() if p.requires_grad]
                gradients.append(torch.cat([p.grad.flatten() for p in trained]))
            self.row("adapters' gradients, packed against one by one, float32",
                     apart(*gradients) / gradients[1].abs().max().item(), "of the largest",
                     at_most=1e-3)
            self.row("effect of these adapters", apart(logps, ref_logps), "nats", at_least=1e-3)

        def nf4():
            with tempfile.TemporaryDirectory() as folder:
                LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
                model = load_model(folder, load_in_4bit=True)
                model = add_lora(model, 16, gradient_checkpointing=True).train()
            with torch.autocast(self.device, torch.bfloat16, enabled=self.cuda):
                with_gradient = together(model)  # unpacks weights
                with torch.no_grad():
                    got, expected = together(model), alone(model)  # a kernel for few rows on CUDA
            with_gradient.sum().backward()
            gradients = [p.grad.float() for p in model.parameters() if p.grad is not None]
            norm = sum(gradient.norm() ** 2 for gradient in gradients).sqrt().item()
            self.row("NF4 log-probs, packed against one by one", apart(got, expected), "nats",
                     at_most=0.25)
            self.row("NF4 log-probs, with gradient against without", apart(with_gradient, got),
                     "nats", at_most=0.25)
            self.row("NF4, norm of the adapters' gradient", norm, at_least=1e-6)

        with torch.no_grad():
            packed, exact = together(base), alone(base)
        self.row("log-probs, packed against one by one, float32", apart(packed, exact), "nats",
                 at_most=1e-4)

        def attention_by_tree():
            model = LlamaForCausalLM(config).to(self.device, torch.bfloat16).eval()
            model.load_state_dict(base.state_dict())
            with torch.no_grad():
                got, kept = together(model), attention.SHORT_CUTS_ON
                attention.SHORT_CUTS_ON = {} if self.device in kept else {self.device}
                other = together(model)
                attention.SHORT_CUTS_ON = kept
            self.row("log-probs in bf16, attention by tree against one mask", apart(got, other),
                     "nats", f"to float32 {apart(got, exact):.2g} and {apart(other, exact):.2g}",
                     at_most=0.25)

        def greedy():
            chat = LocalChat(base, load_tokenizer("tiny"))
            chat.stops = set()
            shape = [ids(50 * scale, vocabulary) for _ in range(2)], 3, 4 * scale
            mine = sum(ours(chat, *shape, 0), [])
            theirs = generate(base, *shape, do_sample=False)
            same = sum(a == b for one, other in zip(mine, theirs) for a, b in zip(one, other))
            self.row("greedy tokens equal to generate's, float32", 100 * same / (6 * shape[2]), "%",
                     at_least=100)

        for function in (attention_by_tree, greedy, adapters, nf4):
            self.attempt(function.__name__, function)

    # ---------------------------------------------------------------- speed and memory

    def shape(self, **more):
        import memory
        from transformers import LlamaConfig
        small = memory.SMALL | dict(
            hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2,
            num_hidden_layers=2, vocab_size=1024)
        config = LlamaConfig(**(small if self.smoke else memory.LLAMA_8B) | more)
        config._attn_implementation = "sdpa"
        return config

    def step(self):
        import memory
        torch, config = self.torch, self.shape()
        size = 128 if self.smoke else 8192
        a, b = (torch.randn(size, size, device=self.device).bfloat16() for _ in range(2))
        rate = 2 * size**3 / min(self.timed(lambda: a @ b)[1] for _ in range(10))
        self.row(f"bf16 product of {size} x {size}", rate / 1e12, "TFLOP/s")
        (model, optimizer), seconds, _ = self.timed(lambda: memory.prepare(config, self.device))
        self.row("NF4 model made", model.get_memory_footprint() / 1e9, "GB with adapters",
                 f"in {seconds:.0f} s")
        limits = {} if self.smoke else {8192: 20, 16384: 24}  # tokens: GB

        def measure(stage, tokens):
            peak, seconds, loss = memory.measure(model, optimizer, stage, tokens, repeats=2)
            trees = memory.trees_of(stage, tokens, config.vocab_size)
            in_messages = sum(b - a for _, spans, _ in trees for a, b in spans)
            in_messages = in_messages or sum(map(len, trees[0][2]))
            parts = memory.estimate(config, tokens, in_messages, 2 if self.cuda else 4)
            name = f"{stage}, {tokens:,} tokens"
            assert math.isfinite(loss)
            self.row(f"{name}: peak", max(0, peak) / 1e9, "GB" if self.cuda else "GB more",
                     f"computed {memory.total(parts) / 1e9:.1f}", at_most=limits.get(tokens))
            self.row(f"{name}: share of the bf16 product",
                     100 * memory.flops(config, trees) / seconds / rate, "%",
                     f"{tokens / seconds:,.0f} tokens/s, {seconds:.3g} s",
                     at_least=40 if limits else None)

        for tokens in (640, 960) if self.smoke else (2048, 8192, 4096, 16384):
            for stage in ("critic", "policy"):
                self.attempt(f"{stage}, {tokens:,} tokens",
                             functools.partial(measure, stage, tokens))
        tokens = 640 if self.smoke else 8192
        trees = memory.trees_of("critic", tokens, config.vocab_size)
        self.attempt("profile", lambda: self.largest_costs(
            f"critic, {tokens:,} tokens", lambda: memory.step(model, "critic", trees, optimizer)))

    def sampler(self):
        """(model, its LocalChat that never stops, function n -> n prompts, tokens per message)."""
        import memory

        from colbench.lm.load import load_tokenizer
        from colbench.lm.sampling import LocalChat
        config = self.shape()
        self.torch.manual_seed(0)
        dtype = self.torch.bfloat16 if self.cuda else self.torch.float32
        model = memory.random_model(config, self.device, dtype)
        chat = LocalChat(model.eval(), load_tokenizer("tiny"))
        chat.stops = set()
        length, tokens = (40, 6) if self.smoke else (1024, 64)

        def prompts(n):
            return [ids(length, config.vocab_size) for _ in range(n)]
        return model, chat, prompts, tokens

    def sample(self):
        from sampling import DRAWN, generate, ours
        model, chat, prompts, tokens = self.sampler()
        self.attempt("warm-up", lambda: (ours(chat, prompts(2), 2, 4, 1.0),
                                         generate(model, prompts(2), 2, 4, **DRAWN)))

        def measure(states, rows):
            shape = prompts(states), rows, tokens
            mine, fast, peak = self.timed(lambda: ours(chat, *shape, 1.0))
            assert [len(message) for row in mine for message in row] == [tokens] * states * rows
            new = states * rows * tokens
            name = f"{states} prompts x {rows} messages of {tokens} tokens"
            self.row(name, new / fast, "tokens/s", f"{fast:.3g} s, peak {peak:.1f} GB")
            theirs, slow, peak = self.timed(lambda: generate(model, *shape, **DRAWN))
            assert [len(message) for message in theirs] == [tokens] * states * rows
            self.row(f"{name}: against generate", slow / fast, "x",
                     f"{new / slow:,.0f} tokens/s, peak {peak:.1f} GB",
                     at_least=3 if rows == 16 else None)  # the smoke test has no target

        for states, rows in ((4, 1), (2, 3)) if self.smoke else ((8, 16), (1, 16), (64, 1)):
            self.attempt(f"{states} x {rows}", functools.partial(measure, states, rows))
        short = (prompts(2), 3, 4) if self.smoke else (prompts(8), 16, 16)
        self.attempt("profile", lambda: self.largest_costs(
            f"{short[2]} tokens", lambda: ours(chat, *short, 1.0)))

    def continuous(self):
        from sampling import continuous
        model, _, prompts, tokens = self.sampler()
        states, rows = (2, 3) if self.smoke else (8, 16)
        settings = dict(num_blocks=16, max_batch_tokens=256) if self.smoke else {}

        def measure(what, keep):
            replies, seconds, peak = self.timed(
                lambda: continuous(model, prompts(states), rows, tokens, keep, **settings))
            # transformers 5.17 waits for all messages but returns only the first of each prompt
            lengths = [*map(len, replies)]
            assert {*lengths} == {tokens} and len(replies) in (states, states * rows), lengths
            self.row(f"{states} prompts x {rows} messages of {tokens} tokens, {what}",
                     states * rows * tokens / seconds, "tokens/s",
                     f"{seconds:.3g} s, peak {peak:.1f} GB")

        self.attempt("first call", functools.partial(measure, "with its preparation", False))
        self.attempt("preparation", lambda: continuous(
            model, prompts(states), rows, tokens, True, **settings))
        self.attempt("prepared", functools.partial(measure, "prepared", True))

    # ---------------------------------------------------------------- against TRL, and the scripts

    def dpo(self):
        import dpo_vs_trl
        peer = dpo_vs_trl.DPOTrainer is not object
        small = SimpleNamespace(
            states=2, prompt=24 if self.smoke else 200, response=8 if self.smoke else 60,
            tokens_per_step=512, settings=peer, repeats=peer, bf16=False, device=self.device,
            shape=self.shape(num_hidden_layers=2).to_dict())
        large = SimpleNamespace(**vars(small) | dict(
            states=4 if self.smoke else 8, prompt=24 if self.smoke else 1000, tokens_per_step=8192,
            settings=(1 if self.smoke else 4) * peer, repeats=2 * peer, bf16=True,
            shape=self.shape(num_hidden_layers=4).to_dict()))

        def equal():
            result, _, _ = dpo_vs_trl.compare(small)
            self.row("pairs/s in float32", result["pairs"] / result["ours"], "pairs/s",
                     "" if peer else "TRL is not installed")
            if peer:
                self.row("losses against TRL's in float32", result["difference"], "apart",
                         at_most=1e-4)

        def speed():
            result, mine, theirs = dpo_vs_trl.compare(large)
            if peer:
                self.row(f"against TRL's best of {large.settings} settings, bf16",
                         result["trl"] / result["ours"], "x",
                         f"{result['ours']:.3g} s against {result['trl']:.3g} s for "
                         f"{result['pairs']} pairs, losses {result['difference']:.1g} apart; "
                         f"{' '.join(map(str, result['best']))}", at_least=3.5)
                self.attempt("TRL's profile", lambda: self.largest_costs("TRL", theirs))
            self.attempt("our profile", lambda: self.largest_costs("ours", mine))

        self.attempt("float32", equal)
        self.attempt("bf16", speed)

    def scripts(self):
        few = dict(collect="--n-tasks 8 --k 4 --candidate-share 0.5 --n-candidates 4",
                   train_critic="--epochs 1", train_policy="--epochs 1", evaluate="--n-tasks 8")
        whole = dict(collect="--n-tasks 100 --k 4 --candidate-share 0.2",
                     train_critic="--epochs 1 --tokens-per-step 8192",
                     train_policy="--tokens-per-step 8192", evaluate="--n-tasks 100")

        def four(name, sizes, more):
            with tempfile.TemporaryDirectory() as folder:
                for script, flags in sizes.items():
                    command = [sys.executable, f"{script}.py", "--run", f"{folder}/run",
                               *flags.split(), *more]
                    if script in ("collect", "evaluate"):  # answers of the embedded model are safe
                        command.append("--allow-weak-sandbox")
                    start = time.perf_counter()
                    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
                    print(f"{script}\n{done.stdout}{done.stderr[-3000:]}", flush=True)
                    if done.returncode:
                        last = (done.stderr.strip().splitlines() or ["?"])[-1]
                        raise RuntimeError(f"{script}.py: {last}")
                    self.row(f"{name}: {script}", time.perf_counter() - start, "s")
                metrics = json.loads(Path(folder, "run", "metrics.json").read_text())
            policies = metrics["policies"]
            base, policy = (100 * values["fixed"]["success"] for values in policies.values())
            self.row(f"{name}: success of the policy", policy, "%", f"base {base:.1f} %")

        self.attempt("in 4-bit",
                     lambda: four("embedded model in 4-bit", few, ["--load-in-4bit"]))
        if not self.smoke:
            self.attempt("plain", lambda: four("embedded model", whole, []))


if __name__ == "__main__":
    main()
