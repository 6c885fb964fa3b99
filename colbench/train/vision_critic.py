"""The paper's critic for Frontend Design: a vision-language model with a regression head.

Pages are best judged by looking at them. So the advantage of a turn is not a log-ratio but a linear
head w, b on the last hidden state of a vision-language model. It reads the request, the picture of
the page that the message shows, and the picture of the hidden page c:

    (1')  A_θ(o, a, c) = w · h_θ(request, picture of a, picture of c) + b

The objective is (2) of train_critic.py without NLL, since there are no tokens to predict. With
--critic regression on a text model, the same head reads the dialogue instead.
"""
import math
import random
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from tqdm import tqdm

from colbench.env.data import load_trajectories, of_first_tasks
from colbench.env.dialogue import said
from colbench.env.flags import played_with
from colbench.env.frontend.browser import Renderer
from colbench.env.frontend.human import scaled
from colbench.lm.adapters import training_mode
from colbench.lm.load import keep_4bit_layout, keep_freed_memory, nf4
from colbench.run.errors import UserError
from colbench.run.files import seed_of
from colbench.train.heads import value_head
from colbench.train.loop import (DIVERGED, StepLog, load_checkpoint, save_checkpoint,
                                 save_trained)
from colbench.train.start import linear_schedule, training_plan

QUESTION = ("A person asked for this web page: {request}\nHow far does the first picture, the page "
            "that was made, match the second, the page wanted?")


class Critic:
    """(1'). `advantage(request, own, hidden)` is a scalar tensor.

    own, hidden: paths of pictures; own is None where the message shows no page.
    """

    def __init__(self, name: str, lora_rank: int = 0, folder: Path | None = None,
                 load_in_4bit: bool = False):
        from transformers import AutoModelForImageTextToText, AutoProcessor
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        is_lora = folder and (folder / "adapter_config.json").exists()
        source = folder if folder and not is_lora else name
        quantisation = nf4(dtype) if load_in_4bit else None
        try:
            self.processor = AutoProcessor.from_pretrained(name)
            model = AutoModelForImageTextToText.from_pretrained(
                source, dtype=dtype, quantization_config=quantisation, device_map={"": device})
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = str(error).strip().split("\n")[0][:200]
            raise UserError(f"--vision-critic {name}: {reason}; give the hub id or folder of a "
                            "vision-language model") from None
        keep_4bit_layout(model)
        keep_freed_memory(model)
        if is_lora:
            model = PeftModel.from_pretrained(model, folder)
        elif lora_rank and not folder:
            model = get_peft_model(model, LoraConfig(
                r=lora_rank, lora_alpha=2 * lora_rank, target_modules="all-linear"))
        self.model, self.tokens = model, 0  # tokens that the model has read so far
        model.value_head = value_head(model, folder)  # starts at A = 0, like a log-ratio

    def advantage(self, request: str, own, hidden) -> torch.Tensor:
        """A of one message; differentiable."""
        pictures = [scaled(path) for path in (own, hidden) if path]
        if not own:  # a message without a page counts as black, as for the reward
            pictures.insert(0, Image.new("RGB", (224, 224), "black"))
        text = {"type": "text", "text": QUESTION.format(request=request)}
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, text]}]
        prompt = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = self.processor(images=pictures, text=prompt, return_tensors="pt")
        inputs = inputs.to(self.model.device, dtype=self.model.dtype)
        self.tokens += inputs["input_ids"].numel()
        output = self.model(**inputs, output_hidden_states=True, use_cache=False)
        last_hidden = output.hidden_states[-1][0, -1]  # (hidden size,)
        return self.model.value_head(last_hidden.float())[0]


def pair_step(critic: Critic, chosen: list, rejected: list, beta: float, weight: float) -> tuple:
    """Add the gradient of (2) for one pair to the parameters; returns its loss and margin.

    chosen, rejected: one list of `advantage`'s arguments per turn. The loss depends on the turns of
    a trajectory through one sum, so its derivative by each turn's A is the same number. A pass
    without gradients gives it, then each turn has its own backward pass: only one turn is in memory
    at a time.
    """
    with torch.no_grad():
        chosen_score = sum(critic.advantage(*turn) for turn in chosen)
        rejected_score = sum(critic.advantage(*turn) for turn in rejected)
    margin = chosen_score - rejected_score
    slope = beta * torch.sigmoid(-beta * margin) * weight  # −dJ/dΣA(τ+) = dJ/dΣA(τ−)
    for turns, sign in ((chosen, -1), (rejected, 1)):
        for turn in turns:
            critic.advantage(*turn).backward(sign * slope)
    return -F.logsigmoid(beta * margin).item(), margin.item()


def train(args, accelerator, critic: Critic, pairs: list, turns: dict) -> None:
    """The loop of train_critic.py on pictures, in one process. Writes RUN/critic."""
    model, output = critic.model, args.critic_folder
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=0.0)
    steps_per_epoch = math.ceil(len(pairs) / args.batch_size)
    n_steps = args.epochs * steps_per_epoch
    schedule = linear_schedule(optimizer, n_steps)
    names = {number: [(request, own and Path(own).name, Path(hidden).name)
                      for request, own, hidden in of_trajectory]
             for number, of_trajectory in turns.items()}
    data = seed_of(pairs, names)
    first_step = load_checkpoint(output, model, optimizer, schedule, args, data)
    examples = [SimpleNamespace(pairs=[pair], tokens=None) for pair in pairs]
    training_plan(accelerator, args, output, model, examples, n_steps, first_step)
    training_mode(model)
    bar = tqdm(range(first_step, n_steps), initial=first_step, total=n_steps, desc=output.name)
    log = StepLog(accelerator, output, bar, first_step)

    for step in bar:
        epoch, place = divmod(step, steps_per_epoch)
        order = random.Random(seed_of(args.seed, "critic", epoch)).sample(pairs, len(pairs))
        batch = order[place * args.batch_size:(place + 1) * args.batch_size]
        for a, b in batch:
            tokens = critic.tokens
            loss, margin = pair_step(critic, turns[a], turns[b], args.beta, 1 / len(batch))
            metrics = {"margin": margin, "rewards/accuracies": margin > 0}
            log.add((critic.tokens - tokens) // 2, loss=loss, **metrics)

        grad_norm = accelerator.clip_grad_norm_(trained, max_norm=1.0).item()
        means = log.means()
        if math.isfinite(means["loss"]) and math.isfinite(grad_norm):
            optimizer.step()
        learning_rate = schedule.get_last_lr()[0]
        schedule.step()
        optimizer.zero_grad()

        log.write(step, means, grad_norm, learning_rate)
        diverged = log.skipped_in_a_row == 5
        if diverged or (step + 1) % args.save_every == 0:
            save_checkpoint(accelerator, output, model, optimizer, schedule, step + 1, data)
        if diverged:
            raise UserError(f"step {step}: {DIVERGED}")
    save_trained(accelerator, output, model, critic.processor, vars(args))


@torch.no_grad()
def score(critic: Critic, renderer, page_shown, states: list[dict]) -> list[list[float]]:
    """(1') of every candidate of every state, for the page the dialogue would show after it."""
    advantages = []
    for state in states:
        history = state["messages"][1:]
        pages = [page_shown([*history, {"role": "assistant", "content": said(text)[0]}])
                 for text in state["candidates"]]
        hidden, *own = renderer.render([state["task"]["ground_truth"], *pages])
        request = history[0]["content"]
        advantages.append([critic.advantage(request, picture.path, hidden.path).item()
                           for picture in own])
    return advantages


def turns_by_trajectory(trajectories, pairs, renderer, page_shown) -> dict:
    """{number of a trajectory: the arguments of `advantage` for each of its turns}."""
    turns = {}
    for number in tqdm(sorted({n for pair in pairs for n in pair}), desc="pages",
                       unit="trajectory"):
        task, history = trajectories[number]["task"], trajectories[number]["dialogue_history"]
        pages = [page_shown(history[:i + 1]) for i, message in enumerate(history)
                 if message["role"] == "assistant"]
        hidden, *own = renderer.render([task["ground_truth"], *pages])
        request = task["problem_description"]
        turns[number] = [(request, picture.path, hidden.path) for picture in own]
    return turns


def train_and_rank(args, accelerator, environment, todo: str, trajectory_pairs, rank) -> None:
    """train_critic.py with --vision-critic; its own trajectory_pairs and rank are handed in.

    Writes RUN/critic (adapter and head) and RUN/preferences.jsonl."""
    if accelerator.num_processes > 1:
        raise UserError("--vision-critic trains in one process: start it without accelerate's "
                        "launcher")
    played = SimpleNamespace(**played_with(args, environment))
    page_shown = environment(played).page_shown  # as when it was played
    torch.manual_seed(args.seed)  # LoRA's A matrices start at random
    with Renderer(args.trajectories.parent / "screenshots", layout=False) as renderer:
        if todo == "train":
            everything = load_trajectories(args.trajectories, environment.check_task)
            everything = of_first_tasks(everything, args.max_trajectories)
            trajectories = [trajectory for trajectory in everything if "reward" in trajectory]
            pairs = trajectory_pairs(trajectories, args.pairs_per_task, args.seed)
            if not pairs:
                raise UserError(f"{args.trajectories}: no pair to learn from: no task has two "
                                "trajectories of different reward; collect more")
            critic = Critic(args.vision_critic, args.lora_rank, load_in_4bit=args.load_in_4bit)
            turns = turns_by_trajectory(trajectories, pairs, renderer, page_shown)
            train(args, accelerator, critic, pairs, turns)
        else:
            critic = Critic(args.vision_critic, folder=args.critic_folder,
                            load_in_4bit=args.load_in_4bit)
        critic.model.eval()
        rank(args, accelerator, environment, partial(score, critic, renderer, page_shown))
