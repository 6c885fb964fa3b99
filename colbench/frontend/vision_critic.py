"""The paper's critic of Frontend Design: a vision-language model with a regression head that sees both pages (train_critic.py calls it).

A page is judged best by looking at it. The turn-level advantage is then not a log-ratio but a linear head w on the last hidden state
of a vision-language model that reads the request, the picture of the page that the message shows, and the picture of the reference:

    (1')  A_θ(o, a, c) = w · h_θ(request, picture of a, picture of c)

It is trained with the very objective (2) of train_critic.py but for its NLL term: there are no tokens to predict. With
--critic regression on a text model the same head reads the dialogue instead.
"""
import json
import random
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from tqdm import tqdm
from transformers import get_linear_schedule_with_warmup

from colbench.dialogue import said
from colbench.files import UserError, append_jsonl, lock_run, seed_of, write_aside
from colbench.frontend.browser import Renderer
from colbench.frontend.humans import scaled
from colbench.frontend.protocol import page_shown
from colbench.model import keep_4bit_layout, nf4
from colbench.tasks import load_trajectories, of_first_tasks

QUESTION = ("A person asked for this web page: {request}\nHow far does the first picture, the page that was made, match the second, "
            "the page wanted?")


class Critic:
    """(1'). `advantage(request, mine, wanted)` is a scalar tensor; mine: path of a picture, or None where the message shows no page."""

    def __init__(self, name: str, lora_rank: int = 0, folder: Path | None = None, load_in_4bit: bool = False):
        from transformers import AutoModelForImageTextToText, AutoProcessor
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        try:
            self.processor = AutoProcessor.from_pretrained(name)
            model = AutoModelForImageTextToText.from_pretrained(
                name, dtype=dtype, quantization_config=nf4(dtype) if load_in_4bit else None, device_map={"": device})
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = str(error).strip().split("\n")[0][:200]
            raise UserError(f"--vision-critic {name}: {reason}; the hub id or folder of a vision-language model is wanted") from None
        keep_4bit_layout(model)
        width = model.config.get_text_config().hidden_size
        if folder:
            model = PeftModel.from_pretrained(model, folder)
        elif lora_rank:
            model = get_peft_model(model, LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules="all-linear"))
        self.model = model
        self.head = torch.nn.Linear(width, 1, bias=False, device=device)
        torch.nn.init.zeros_(self.head.weight)  # A = 0 before the first step, as with a log-ratio
        if folder:
            self.head.load_state_dict(torch.load(folder / "head.pt", map_location=device))

    def advantage(self, request: str, mine, wanted) -> torch.Tensor:
        pictures = [scaled(path) for path in (mine, wanted) if path]
        if not mine:  # a message without a page: black, as for the reward
            pictures.insert(0, Image.new("RGB", (224, 224), "black"))
        content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": QUESTION.format(request=request)}]
        prompt = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = self.processor(images=pictures, text=prompt, return_tensors="pt").to(self.model.device, dtype=self.model.dtype)
        hidden = self.model(**inputs, output_hidden_states=True, use_cache=False).hidden_states[-1][0, -1]  # (width,)
        return self.head(hidden.float())[0]

    def parameters(self) -> list:
        return [p for p in self.model.parameters() if p.requires_grad] + list(self.head.parameters())

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        torch.save(self.head.state_dict(), folder / "head.pt")


def turns_of(trajectory: dict, shown) -> list:
    """(index of the message in the dialogue, the page it shows or None) of each agent turn."""
    history = trajectory["dialogue_history"]
    return [(i, shown(history[:i + 1])) for i, message in enumerate(history) if message["role"] == "assistant"]


def pair_step(critic: Critic, chosen: list, rejected: list, beta: float, weight: float) -> tuple:
    """Add the gradient of (2) for one pair to the parameters; chosen, rejected: lists of arguments of `advantage`, one a turn.

    All turns of a trajectory enter the loss through one sum, so its gradient with respect to each turn's A is one number: known
    after a pass without gradients, it is handed to each turn's backward pass, and only one turn at a time is held in memory."""
    with torch.no_grad():
        sum_chosen, sum_rejected = (sum(critic.advantage(*turn) for turn in turns) for turns in (chosen, rejected))
    margin = sum_chosen - sum_rejected
    slope = beta * torch.sigmoid(-beta * margin) * weight  # −dJ/dΣA(τ+) = dJ/dΣA(τ−)
    for turns, sign in ((chosen, -1), (rejected, 1)):
        for turn in turns:
            critic.advantage(*turn).backward(sign * slope)
    return -F.logsigmoid(beta * margin).item(), margin.item()


def train_and_rank(args, make_pairs, states_to_rank) -> None:
    """train_critic.py with --vision-critic. Writes RUN/critic (adapter and head) and RUN/preferences.jsonl."""
    lock = lock_run(args.run, "critic")  # noqa: F841  held until the process ends
    shown = partial(page_shown, language=args.page_language, rule=args.extraction)
    torch.manual_seed(args.seed)
    with Renderer(args.trajectories.parent / "screenshots", layout=False, tabs=args.tabs) as renderer:
        if not args.critic_folder.exists():
            trajectories = [t for t in of_first_tasks(load_trajectories(args.trajectories), args.max_trajectories) if "reward" in t]
            pairs = make_pairs(trajectories, args.pairs_per_task, args.seed, args.min_gap)
            if not pairs:
                raise UserError(f"{args.trajectories}: no pair to learn from (--min-gap {args.min_gap}); collect more, or lower it")
            critic = Critic(args.vision_critic, args.lora_rank, load_in_4bit=args.load_in_4bit)
            train(args, critic, pairs, turns_by_trajectory(trajectories, pairs, renderer, shown))
            write_aside(args.critic_folder, critic.save)
        else:
            critic = Critic(args.vision_critic, folder=args.critic_folder, load_in_4bit=args.load_in_4bit)
        states, missing = states_to_rank(args)
        rank(args, critic, [s for s in states if (s["id"], s["sample"], s["turn"]) in missing], renderer, shown)


def turns_by_trajectory(trajectories, pairs, renderer, shown) -> dict:
    """Number of a trajectory -> the arguments of `advantage` of its turns. Renders what is not there yet."""
    result = {}
    for index in tqdm(sorted({i for pair in pairs for i in pair}), desc="pages", unit="trajectory"):
        task, turns = trajectories[index]["task"], turns_of(trajectories[index], shown)
        wanted, *mine = renderer.render([task["ground_truth"], *(page for _, page in turns)])
        result[index] = [(task["problem_description"], picture.path, wanted.path) for picture in mine]
    return result


def train(args, critic: Critic, pairs: list, turns: dict) -> None:
    critic.model.train()
    optimizer = torch.optim.AdamW(critic.parameters(), lr=args.learning_rate, weight_decay=0.0)
    steps = args.epochs * -(-len(pairs) // args.batch_size)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    log = open(Path(args.run) / "critic_log.jsonl", "w", encoding="utf-8")
    step = 0
    for epoch in range(args.epochs):
        order = random.Random(seed_of(args.seed, "critic", epoch)).sample(pairs, len(pairs))
        for start in tqdm(range(0, len(order), args.batch_size), desc=f"critic, epoch {epoch + 1}", unit="step"):
            batch = order[start:start + args.batch_size]
            rows = [pair_step(critic, turns[a], turns[b], args.beta, 1 / len(batch)) for a, b in batch]
            gradient_norm = torch.nn.utils.clip_grad_norm_(critic.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses, margins = zip(*rows)
            append_jsonl(log, {"step": step, "loss": sum(losses) / len(rows), "margin": sum(margins) / len(rows),
                               "rewards/accuracies": sum(m > 0 for m in margins) / len(rows), "gradient_norm": float(gradient_norm)})
            step += 1
    log.close()
    critic.model.eval()


@torch.no_grad()
def rank(args, critic: Critic, states: list, renderer, shown) -> None:
    """Advantage (1') of every candidate of every state: the page that the dialogue would show after it."""
    for state in tqdm(states, desc="ranking", unit="state"):
        history = state["messages"][1:]
        pages = [shown([*history, {"role": "assistant", "content": said(text)[0]}]) for text in state["candidates"]]
        wanted, *mine = renderer.render([state.pop("task")["ground_truth"], *pages])
        state["advantages"] = [critic.advantage(history[0]["content"], picture.path, wanted.path).item() for picture in mine]
        append_jsonl(args.preferences, state)
    print(json.dumps({"states ranked": len(states), "file": str(args.preferences)}))
