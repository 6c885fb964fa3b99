"""What a GPU tells about the 8B path, unattended, in less than nine minutes on an H100, without a network.

    python tests/gpu/run.py OUT                          # all parts; the table comes last
    python tests/gpu/run.py OUT --wheels DIR             # first install from DIR what the machine lacks
    python tests/gpu/run.py OUT --smoke                  # the same in miniature, on a CPU too, in two minutes
    python tests/gpu/run.py OUT --only step,sample       # some parts

Weights are random and made on the card. The machine has torch, transformers, peft and accelerate; the rest comes as
wheels, from DIR or a folder `wheels` beside the repository, and goes to a temporary folder (for Python 3.12 on Linux):

    pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_24_x86_64 --platform any \
        -d ../wheels bitsandbytes==0.50.2 trl==1.16.0 datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19

Parts, in order of worth, each a process with a time limit of its own, so that none costs another:
 correct     log-probs packed against one by one, gradients, greedy sampling against generate, adapters off, NF4
 step        a critic's and a policy's step with π_ref's pass on Llama-3.1-8B in NF4: memory beside the computed,
             tokens/s, the share of the card's measured bf16 product that the FLOPs needed are; three largest costs
 sample      64 dialogues, 8 states and 1 state with 16 candidates, 1k-token prompts: against generate
 scripts     the four scripts on the embedded model, in 4-bit and plain, with the table
 dpo         step-level DPO against TRL's best setting, 8B shape with four layers: equal losses in float32, then speed
 continuous  the sampling of 8 states by continuous batching, which may take the card with it: so it is last
Rows are appended to OUT/results.jsonl as they come; OUT/PART.log has what a part printed. Exit code 1 if one failed.
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
LIMITS = {"correct": 140, "step": 160, "sample": 120, "scripts": 220, "dpo": 90, "continuous": 45}  # seconds at most
ALL = 530  # seconds for all parts together: most take far less than their limit
RANDOM_IDS = random.Random(0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for results.jsonl and logs")
    parser.add_argument("--smoke", action="store_true", help="in miniature")
    parser.add_argument("--wheels", type=Path, default=ROOT.parent / "wheels")
    parser.add_argument("--only", default=",".join(LIMITS), help="parts, with commas")
    parser.add_argument("--part", choices=LIMITS, help=argparse.SUPPRESS)  # run it in this process
    args = parser.parse_args()
    if not {*args.only.split(",")} <= {*LIMITS}:
        parser.error(f"--only {args.only}: parts are {', '.join(LIMITS)}")
    if args.part:
        return Part(args.out, args.part, args.smoke).run()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    patience = 4 if args.smoke else 1  # the miniature may run beside much else
    results, end = args.out / "results.jsonl", time.monotonic() + ALL * patience
    results.write_text("")
    with tempfile.TemporaryDirectory() as site:
        paths = [site, *filter(None, [os.environ.get("PYTHONPATH")])] if install(args.wheels, site) else None
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
        for part in args.only.split(","):
            start, log = time.monotonic(), args.out / f"{part}.log"
            command = [sys.executable, __file__, str(args.out), "--part", part, *["--smoke"] * args.smoke]
            limit = min(LIMITS[part] * patience, end - start)
            trouble = "no time was left" if limit < 10 else run(
                command, log, limit, environment | ({"PYTHONPATH": os.pathsep.join(paths)} if paths else {}))
            if trouble:
                with results.open("a") as file:
                    file.write(json.dumps({"part": part, "what": "failed", "error": trouble}) + "\n")
            print(f"{part}: {time.monotonic() - start:.0f} s {trouble}", flush=True)
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    print_table(rows)
    sys.exit(any("error" in row for row in rows))


def install(wheels: Path, site: str) -> bool:
    """Whether wheels of packages that are missing here were installed into the folder `site`."""
    def missing(wheel):
        try:
            return not importlib.metadata.version(wheel.name.split("-")[0])
        except importlib.metadata.PackageNotFoundError:
            return True
    lacking = [str(wheel) for wheel in sorted(wheels.glob("*.whl")) if missing(wheel)]
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", site]
    return bool(lacking) and not subprocess.run([*pip, *lacking]).returncode


def run(command, log: Path, limit: float, environment) -> str:
    """Run a part with all that it starts; "" or, in a line, why it failed."""
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=environment,
                                   start_new_session=True)
        try:
            code = process.wait(timeout=max(1, limit))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)  # what the part started, too
            except ProcessLookupError:
                pass
            with contextlib.suppress(subprocess.TimeoutExpired):  # one that hangs in the driver costs no other part
                process.wait(timeout=20)
    last = (log.read_text(errors="replace").strip().splitlines() or [""])[-1][:200]
    return "" if code == 0 else f"time limit of {limit:.0f} s" if code is None else f"exit code {code}: {last}"


def print_table(rows: list[dict]) -> None:
    """The rows as a markdown table, the card above it."""
    print("\n" + next((row["machine"] for row in rows if "machine" in row), "no part got as far as the machine"))
    print("\n| part | what | measured | beside it | target |\n|---|---|---|---|---|")
    for row in rows:
        measured = f"failed: {row['error']}" if "error" in row else f"{row['value']:,.4g} {row['unit']}"
        target = f"{row['target']}: {'met' if row['met'] else 'NOT met'}" if row.get("target") else ""
        cells = [row["part"], row["what"], measured, row.get("beside", ""), target]
        print("| " + " | ".join(str(cell).replace("|", "/").strip() for cell in cells) + " |")


def ids(n: int, vocabulary: int) -> list[int]:
    return [RANDOM_IDS.randrange(vocabulary) for _ in range(n)]


class Part:
    """One part in its own process: `row` writes what was measured, `attempt` lets the rest go on when a thing fails."""

    def __init__(self, out: Path, name: str, smoke: bool):
        import torch

        from colbench.lm.load import prepare_machine
        prepare_machine()
        self.out, self.name, self.smoke, self.torch = out, name, smoke, torch
        self.cuda = torch.cuda.is_available()
        self.device = "cuda" if self.cuda else "cpu"
        import transformers
        self.machine = (f"{torch.cuda.get_device_name() if self.cuda else 'CPU'}, torch {torch.__version__}, "
                        f"transformers {transformers.__version__}" + ", in miniature" * smoke)
        self.failed = False

    def run(self):
        getattr(self, self.name)()
        sys.stdout.flush()
        os._exit(0)  # threads of a library do not hold it up; what failed has its row

    def write(self, **row):
        with (self.out / "results.jsonl").open("a") as file:
            file.write(json.dumps({"part": self.name, **row, "machine": self.machine}) + "\n")

    def row(self, what: str, value: float, unit: str = "", beside: str = "", at_most=None, at_least=None):
        """A row of the table. at_most, at_least: the target, told whether met or not."""
        target = {}
        if at_most is not None:
            target = {"target": f"at most {at_most:g}", "met": value <= at_most}
        elif at_least is not None:
            target = {"target": f"at least {at_least:g}", "met": value >= at_least}
        self.write(what=what, value=float(value), unit=unit, beside=beside, **target)

    def attempt(self, what: str, function):
        try:
            function()
        except (Exception, SystemExit) as error:
            import traceback
            traceback.print_exc()
            self.write(what=what, error=" ".join(f"{type(error).__name__}: {error}".split())[:200])

    def timed(self, function):
        """(result, seconds, peak GB of CUDA memory)."""
        if self.cuda:
            self.torch.cuda.synchronize()
            self.torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        result = function()
        if self.cuda:
            self.torch.cuda.synchronize()
        return result, time.perf_counter() - start, self.torch.cuda.max_memory_allocated() / 1e9 if self.cuda else 0.0

    def largest_costs(self, what: str, function):
        """A row with the three operations that take most of the time of `function`; warm it up before."""
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile
        with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * self.cuda]) as profiler:
            _, seconds, _ = self.timed(function)
        cost = {event.key: event.self_device_time_total if self.cuda else event.self_cpu_time_total
                for event in profiler.key_averages() if event.device_type == DeviceType.CPU}
        first = sorted(cost, key=cost.get)[:-4:-1]
        busy = sum(cost.values()) / 1e6
        self.row(f"{what}: three largest costs", 100 * sum(cost[name] for name in first) / max(1, sum(cost.values())),
                 "%", f"{', '.join(f'{name} {cost[name] / 1e6 / busy:.0%}' for name in first)}; the device is busy "
                 f"{busy:.3g} s of {seconds:.3g} s under the profiler")

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
        config = LlamaConfig(vocab_size=vocabulary, hidden_size=256, intermediate_size=704, num_hidden_layers=4,
                             num_attention_heads=8, num_key_value_heads=2, initializer_range=0.05)
        base = LlamaForCausalLM(config).to(self.device).eval()
        trees = [Tree(ids(60 * scale, vocabulary), [(20, 31), (50, 60)], []),
                 Tree(ids(40 * scale, vocabulary), [], [ids(n, vocabulary) for n in (9, 1, 17)]),
                 Tree(ids(30 * scale, vocabulary), [(5, 9)], [ids(6, vocabulary)])]

        def together(model):
            return torch.cat([message for tree in message_logps(model, trees) for message in tree])

        def alone(model):
            return torch.cat([row for trunk, spans, leaves in trees
                              for prompt, message in [*((trunk[:a], trunk[a:b]) for a, b in spans),
                                                      *((trunk, leaf) for leaf in leaves)]
                              for row in plain(model, prompt, [message])])

        def apart(one, other):
            return (one - other).abs().max().item()

        def adapters():
            with torch.no_grad():
                before = together(base)
            model = add_lora(base, 16, gradient_checkpointing=True).train()
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.05)
            with torch.no_grad(), adapters_off(model):
                self.row("adapters off against the base model", apart(together(model), before), "nats",
                         at_most=1e-5)  # the base's head was trained: another order of sums
            gradients = []
            for way in (together, alone):
                model.zero_grad()
                logps = way(model)
                logps.sum().backward()
                gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
            self.row("adapters' gradients, packed against one by one, float32",
                     apart(*gradients) / gradients[1].abs().max().item(), "of the largest", at_most=1e-3)
            self.row("what these adapters change", apart(logps, before), "nats", at_least=1e-3)

        def nf4():
            with tempfile.TemporaryDirectory() as folder:
                LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
                model = add_lora(load_model(folder, load_in_4bit=True), 16, gradient_checkpointing=True).train()
            with torch.autocast(self.device, torch.bfloat16, enabled=self.cuda):
                learned = together(model)  # weights unpacked for the gradient's sake
                with torch.no_grad():
                    got, expected = together(model), alone(model)  # few rows: a kernel of their own on CUDA
            learned.sum().backward()
            norm = sum(p.grad.float().norm() ** 2 for p in model.parameters() if p.grad is not None).sqrt().item()
            self.row("NF4 log-probs, packed against one by one", apart(got, expected), "nats", at_most=0.25)
            self.row("NF4 log-probs, with gradient against without", apart(learned, got), "nats", at_most=0.25)
            self.row("NF4, norm of the adapters' gradient", norm, at_least=1e-6)

        with torch.no_grad():
            packed, exact = together(base), alone(base)
        self.row("log-probs, packed against one by one, float32", apart(packed, exact), "nats", at_most=1e-4)

        def brain():
            model = LlamaForCausalLM(config).to(self.device, torch.bfloat16).eval()
            model.load_state_dict(base.state_dict())
            with torch.no_grad():
                got, kept = together(model), attention.SHORT_CUTS_ON
                attention.SHORT_CUTS_ON = {} if self.device in kept else {self.device}
                other = together(model)
                attention.SHORT_CUTS_ON = kept
            self.row("log-probs in bf16, attention by tree against one mask", apart(got, other), "nats",
                     f"to float32 {apart(got, exact):.2g} and {apart(other, exact):.2g}", at_most=0.25)

        def greedy():
            chat = LocalChat(base, load_tokenizer("tiny"))
            chat.stops = set()
            shape = [ids(50 * scale, vocabulary) for _ in range(2)], 3, 4 * scale
            mine, theirs = sum(ours(chat, *shape, 0), []), generate(base, *shape, do_sample=False)
            same = sum(a == b for one, other in zip(mine, theirs) for a, b in zip(one, other))
            self.row("greedy tokens equal to generate's, float32", 100 * same / (6 * shape[2]), "%", at_least=100)

        for function in (brain, greedy, adapters, nf4):
            self.attempt(function.__name__, function)

    # ---------------------------------------------------------------- speed and memory

    def shape(self, **more):
        import memory
        from transformers import LlamaConfig
        small = memory.SMALL | dict(hidden_size=128, intermediate_size=256, num_attention_heads=4,
                                    num_key_value_heads=2, num_hidden_layers=2, vocab_size=1024)
        config = LlamaConfig(**(small if self.smoke else memory.LLAMA_8B) | more)
        config._attn_implementation = "sdpa"
        return config

    def step(self):
        import memory
        torch, size, config = self.torch, 128 if self.smoke else 8192, self.shape()
        a, b = (torch.randn(size, size, device=self.device).bfloat16() for _ in range(2))
        rate = 2 * size**3 / min(self.timed(lambda: a @ b)[1] for _ in range(10))
        self.row(f"bf16 product of {size} x {size}", rate / 1e12, "TFLOP/s")
        (model, optimizer), seconds, _ = self.timed(lambda: memory.prepare(config, self.device))
        self.row("NF4 model made", model.get_memory_footprint() / 1e9, "GB with adapters", f"in {seconds:.0f} s")
        bounds = {} if self.smoke else {8192: 20, 16384: 24}

        def measure(stage, tokens):
            peak, seconds, loss = memory.measure(model, optimizer, stage, tokens, repeats=2)
            trees = memory.trees_of(stage, tokens, config.vocab_size)
            said = sum(b - a for _, spans, _ in trees for a, b in spans) or sum(map(len, trees[0][2]))
            computed = memory.total(memory.estimate(config, tokens, said, 2 if self.cuda else 4))
            name = f"{stage}, {tokens:,} tokens"
            assert math.isfinite(loss)
            self.row(f"{name}: peak", max(0, peak) / 1e9, "GB" if self.cuda else "GB more",
                     f"computed {computed / 1e9:.1f}", at_most=bounds.get(tokens))
            self.row(f"{name}: share of the bf16 product", 100 * memory.flops(config, trees) / seconds / rate, "%",
                     f"{tokens / seconds:,.0f} tokens/s, {seconds:.3g} s", at_least=40 if bounds else None)

        for tokens in (640, 960) if self.smoke else (2048, 8192, 4096, 16384):
            for stage in ("critic", "policy"):
                self.attempt(f"{stage}, {tokens:,} tokens", functools.partial(measure, stage, tokens))
        tokens = 640 if self.smoke else 8192
        trees = memory.trees_of("critic", tokens, config.vocab_size)
        self.attempt("profile", lambda: self.largest_costs(
            f"critic, {tokens:,} tokens", lambda: memory.step(model, "critic", trees, optimizer)))

    def sampler(self):
        """(model, its sampler that never stops, prompts of so many states, tokens of a message)."""
        import memory

        from colbench.lm.load import load_tokenizer
        from colbench.lm.sampling import LocalChat
        config = self.shape()
        self.torch.manual_seed(0)
        model = memory.random_model(config, self.device, self.torch.bfloat16 if self.cuda else self.torch.float32)
        chat = LocalChat(model.eval(), load_tokenizer("tiny"))
        chat.stops = set()
        length, tokens = (40, 6) if self.smoke else (1024, 64)
        return model, chat, lambda n: [ids(length, config.vocab_size) for _ in range(n)], tokens

    def sample(self):
        from sampling import DRAWN, generate, ours
        model, chat, prompts, tokens = self.sampler()
        self.attempt("warm-up", lambda: (ours(chat, prompts(2), 2, 4, 1.0), generate(model, prompts(2), 2, 4, **DRAWN)))

        def measure(states, rows):
            shape = prompts(states), rows, tokens
            mine, fast, peak = self.timed(lambda: ours(chat, *shape, 1.0))
            assert [len(message) for row in mine for message in row] == [tokens] * states * rows
            new, name = states * rows * tokens, f"{states} prompts x {rows} messages of {tokens} tokens"
            self.row(f"{name}", new / fast, "tokens/s", f"{fast:.3g} s, peak {peak:.1f} GB")
            theirs, slow, peak = self.timed(lambda: generate(model, *shape, **DRAWN))
            assert [len(message) for message in theirs] == [tokens] * states * rows
            self.row(f"{name}: against generate", slow / fast, "x", f"{new / slow:,.0f} tokens/s, peak {peak:.1f} GB",
                     at_least=3 if rows == 16 else None)  # the miniature has none

        for states, rows in ((4, 1), (2, 3)) if self.smoke else ((8, 16), (1, 16), (64, 1)):
            self.attempt(f"{states} x {rows}", functools.partial(measure, states, rows))
        short = prompts(2 if self.smoke else 8), 3 if self.smoke else 16, 4 if self.smoke else 16
        self.attempt("profile", lambda: self.largest_costs(f"{short[2]} tokens", lambda: ours(chat, *short, 1.0)))

    def continuous(self):
        from sampling import continuous
        model, _, prompts, tokens = self.sampler()
        states, rows = (2, 3) if self.smoke else (8, 16)
        settings = dict(num_blocks=16, max_batch_tokens=256) if self.smoke else {}

        def measure(what, keep):
            replies, seconds, peak = self.timed(
                lambda: continuous(model, prompts(states), rows, tokens, keep, **settings))
            # transformers 5.17 waits for all messages and returns the first of each prompt
            assert {*map(len, replies)} == {tokens} and len(replies) in (states, states * rows), [*map(len, replies)]
            self.row(f"{states} prompts x {rows} messages of {tokens} tokens, {what}", states * rows * tokens / seconds,
                     "tokens/s", f"{seconds:.3g} s, peak {peak:.1f} GB")

        self.attempt("first call", functools.partial(measure, "with its preparation", False))
        self.attempt("preparation", lambda: continuous(model, prompts(states), rows, tokens, True, **settings))
        self.attempt("prepared", functools.partial(measure, "prepared", True))

    # ---------------------------------------------------------------- against a peer, and the whole

    def dpo(self):
        import dpo_vs_trl
        peer = dpo_vs_trl.DPOTrainer is not object
        small = SimpleNamespace(states=2, prompt=24 if self.smoke else 200, response=8 if self.smoke else 60,
                                tokens_per_step=512, settings=peer, repeats=peer, bf16=False, device=self.device,
                                shape=self.shape(num_hidden_layers=2).to_dict())
        large = SimpleNamespace(**vars(small) | dict(
            states=4 if self.smoke else 8, prompt=24 if self.smoke else 1000, tokens_per_step=8192,
            settings=(1 if self.smoke else 4) * peer, repeats=2 * peer, bf16=True,
            shape=self.shape(num_hidden_layers=4).to_dict()))

        def equal():
            found, _, _ = dpo_vs_trl.compare(small)
            self.row("pairs/s in float32", found["pairs"] / found["ours"], "pairs/s", "" if peer else "TRL is not here")
            if peer:
                self.row("losses against TRL's in float32", found["difference"], "apart", at_most=1e-4)

        def speed():
            found, mine, theirs = dpo_vs_trl.compare(large)
            if peer:
                self.row(f"against TRL's best of {large.settings} settings, bf16", found["trl"] / found["ours"], "x",
                         f"{found['ours']:.3g} s against {found['trl']:.3g} s for {found['pairs']} pairs, losses "
                         f"{found['difference']:.1g} apart; {' '.join(map(str, found['best']))}", at_least=3.5)
                self.attempt("TRL's profile", lambda: self.largest_costs("TRL", theirs))
            self.attempt("our profile", lambda: self.largest_costs("ours", mine))

        self.attempt("float32", equal)
        self.attempt("bf16", speed)

    def scripts(self):
        few = dict(collect="--n-tasks 8 --k 4 --candidate-share 0.5 --n-candidates 4", train_critic="--epochs 1",
                   train_policy="--epochs 1", evaluate="--n-tasks 8")
        whole = dict(collect="--n-tasks 100 --k 4 --candidate-share 0.2",
                     train_critic="--epochs 1 --tokens-per-step 8192", train_policy="--tokens-per-step 8192",
                     evaluate="--n-tasks 100")

        def four(name, sizes, more):
            with tempfile.TemporaryDirectory() as folder:
                for script, flags in sizes.items():
                    safe = ["--allow-weak-sandbox"] * (script in ("collect", "evaluate"))  # its own weights' answers
                    start = time.perf_counter()
                    done = subprocess.run([sys.executable, f"{script}.py", "--run", f"{folder}/run", *flags.split(),
                                           *more, *safe], cwd=ROOT, capture_output=True, text=True)
                    print(f"{script}\n{done.stdout}{done.stderr[-3000:]}", flush=True)
                    if done.returncode:
                        raise RuntimeError(f"{script}.py: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
                    self.row(f"{name}: {script}", time.perf_counter() - start, "s")
                policies = json.loads(Path(folder, "run", "metrics.json").read_text())["policies"]
            base, policy = (100 * values["fixed"]["success"] for values in policies.values())
            self.row(f"{name}: success of the policy", policy, "%", f"base {base:.1f} %")

        self.attempt("in 4-bit", lambda: four("embedded model in 4-bit", few, ["--load-in-4bit"]))
        if not self.smoke:
            self.attempt("plain", lambda: four("embedded model", whole, []))


if __name__ == "__main__":
    main()
