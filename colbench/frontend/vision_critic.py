"""The paper's critic of Frontend Design: a vision-language model with a regression head that sees both pages (train_critic.py calls it).

A page is judged best by looking at it. The turn-level advantage is then not a log-ratio but a linear head w, b on the last hidden state
of a vision-language model that reads the request, the picture of the page that the message shows, and the picture of the reference:

    (1')  A_θ(o, a, c) = w · h_θ(request, picture of a, picture of c) + b

It is trained with the very objective (2) of train_critic.py but for its NLL term: there are no tokens to predict. With
--critic regression on a text model the same head reads the dialogue instead.
"""
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
from colbench.files import UserError, seed_of
from colbench.frontend.browser import Renderer
from colbench.frontend.humans import scaled
from colbench.frontend.protocol import page_shown
from colbench.model import keep_4bit_layout, nf4
from colbench.show import keep_settings, keep_weights, next_step
from colbench.tasks import load_trajectories, of_first_tasks
from colbench.training import DIVERGED, StepLog, load_checkpoint, save_checkpoint, save_trained, value_head, write_ranking

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
            is_lora = folder and (folder / "adapter_config.json").exists()
            model = AutoModelForImageTextToText.from_pretrained(
                folder if folder and not is_lora else name, dtype=dtype, quantization_config=nf4(dtype) if load_in_4bit else None, device_map={"": device})
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = str(error).strip().split("\n")[0][:200]
            raise UserError(f"--vision-critic {name}: {reason}; the hub id or folder of a vision-language model is wanted") from None
        keep_4bit_layout(model)
        if is_lora:
            model = PeftModel.from_pretrained(model, folder)
        elif lora_rank and not folder:
            model = get_peft_model(model, LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules="all-linear"))
        self.model, self.tokens = model, 0  # tokens that went through it so far
        model.value_head = value_head(model, folder)  # A = 0 before the first step, as with a log-ratio

    def advantage(self, request: str, mine, wanted) -> torch.Tensor:
        pictures = [scaled(path) for path in (mine, wanted) if path]
        if not mine:  # a message without a page: black, as for the reward
            pictures.insert(0, Image.new("RGB", (224, 224), "black"))
        content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": QUESTION.format(request=request)}]
        prompt = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = self.processor(images=pictures, text=prompt, return_tensors="pt").to(self.model.device, dtype=self.model.dtype)
        self.tokens += inputs["input_ids"].numel()
        hidden = self.model(**inputs, output_hidden_states=True, use_cache=False).hidden_states[-1][0, -1]  # (width,)
        return self.model.value_head(hidden.float())[0]

    def parameters(self) -> list:
        return [p for p in self.model.parameters() if p.requires_grad]


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


def train_and_rank(args, accelerator, make_pairs, states_to_rank) -> None:
    """train_critic.py with --vision-critic. Writes RUN/critic (adapter and head) and RUN/preferences.jsonl."""
    if accelerator.num_processes > 1:
        raise UserError("--vision-critic trains in one process: start it without accelerate's launcher")
    shown = partial(page_shown, language=args.page_language, rule=args.extraction)
    torch.manual_seed(args.seed)  # LoRA's A matrices start at random
    with Renderer(args.trajectories.parent / "screenshots", layout=False, tabs=args.tabs) as renderer:
        if not args.critic_folder.exists():
            trajectories = [t for t in of_first_tasks(load_trajectories(args.trajectories), args.max_trajectories) if "reward" in t]
            pairs = make_pairs(trajectories, args.pairs_per_task, args.seed, args.min_gap)
            if not pairs:
                raise UserError(f"{args.trajectories}: no pair to learn from (--min-gap {args.min_gap}); collect more, or lower it")
            critic = Critic(args.vision_critic, args.lora_rank, load_in_4bit=args.load_in_4bit)
            train(args, accelerator, critic, pairs, turns_by_trajectory(trajectories, pairs, renderer, shown))
        else:
            critic = Critic(args.vision_critic, folder=args.critic_folder, load_in_4bit=args.load_in_4bit)
        critic.model.eval()
        states, missing = states_to_rank(args)
        keep_settings(args.preferences, args, begun=args.preferences.exists())
        keep_weights(args.preferences, [args.critic_folder])
        write_ranking(accelerator, args.preferences, states, missing, partial(score, critic, renderer, shown))
    print(f"{args.preferences}: {len(missing)} states ranked")
    print(next_step("train_policy.py", args))


def turns_by_trajectory(trajectories, pairs, renderer, shown) -> dict:
    """Number of a trajectory -> the arguments of `advantage` of its turns. Renders what is not there yet."""
    result = {}
    for index in tqdm(sorted({i for pair in pairs for i in pair}), desc="pages", unit="trajectory"):
        task, turns = trajectories[index]["task"], turns_of(trajectories[index], shown)
        wanted, *mine = renderer.render([task["ground_truth"], *(page for _, page in turns)])
        result[index] = [(task["problem_description"], picture.path, wanted.path) for picture in mine]
    return result


def train(args, accelerator, critic: Critic, pairs: list, turns: dict) -> None:
    """The loop of train_critic.py, for one process, on pictures. Writes RUN/critic."""
    optimizer = torch.optim.AdamW(critic.parameters(), lr=args.learning_rate, weight_decay=0.0)
    steps_per_epoch = -(-len(pairs) // args.batch_size)
    steps = args.epochs * steps_per_epoch
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    names = {index: [(request, mine and Path(mine).name, Path(wanted).name) for request, mine, wanted in of] for index, of in turns.items()}
    data = seed_of(pairs, names)  # a checkpoint goes on with the pairs and pictures that it was begun with
    first = load_checkpoint(accelerator, args.critic_folder, critic.model, optimizer, schedule, args, data)
    log = StepLog(accelerator, args.critic_folder.with_name(args.critic_folder.name + "_log.jsonl"), first)
    keep_settings(args.critic_folder, args, begun=bool(first))
    accelerator.init_trackers("critic", config={name: str(value) for name, value in vars(args).items()})
    critic.model.train()
    bar = tqdm(range(first, steps), initial=first, total=steps, desc="critic", unit="step")
    for step in bar:
        torch.manual_seed(seed_of(args.seed, "critic", step))  # for models with dropout
        epoch, place = divmod(step, steps_per_epoch)
        order = random.Random(seed_of(args.seed, "critic", epoch)).sample(pairs, len(pairs))
        batch = order[place * args.batch_size:(place + 1) * args.batch_size]
        for a, b in batch:
            before = critic.tokens
            loss, margin = pair_step(critic, turns[a], turns[b], args.beta, 1 / len(batch))
            log.add((critic.tokens - before) // 2, loss=loss, margin=margin, **{"rewards/accuracies": margin > 0})
        gradient_norm = torch.nn.utils.clip_grad_norm_(critic.parameters(), 1.0)
        row = log.write(step, gradient_norm=float(gradient_norm), learning_rate=schedule.get_last_lr()[0])
        if log.sound:  # no NaN or infinity in loss or gradient; else the step is left out and counted
            optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if log.unsound_in_a_row == 5:
            save_checkpoint(accelerator, args.critic_folder, critic.model, optimizer, schedule, step + 1, data)
            raise UserError(f"step {step}: {DIVERGED}")
        bar.set_postfix(loss=row["loss"], accuracy=row["rewards/accuracies"], margin=row["margin"], skipped=row["skipped"])
        if (step + 1) % args.save_every == 0:
            save_checkpoint(accelerator, args.critic_folder, critic.model, optimizer, schedule, step + 1, data)
    save_trained(accelerator, args.critic_folder, critic.model, critic.processor, vars(args))


@torch.no_grad()
def score(critic: Critic, renderer, shown, states: list[dict]) -> list[list[float]]:
    """Advantage (1') of every candidate of every state: of the page that the dialogue would show after it."""
    advantages = []
    for state in states:
        history = state["messages"][1:]
        pages = [shown([*history, {"role": "assistant", "content": said(text)[0]}]) for text in state["candidates"]]
        wanted, *mine = renderer.render([state["task"]["ground_truth"], *pages])
        advantages.append([critic.advantage(history[0]["content"], picture.path, wanted.path).item() for picture in mine])
    return advantages
