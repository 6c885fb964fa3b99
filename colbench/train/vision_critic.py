"""The paper's critic of Frontend Design: a vision-language model with a regression head (train_critic.py calls it).

A page is judged best by looking at it. The turn-level advantage is then not a log-ratio but a linear head w, b on the
last hidden state of a vision-language model that reads the request, the picture of the page that the message shows, and
the picture of the reference:

    (1')  A_θ(o, a, c) = w · h_θ(request, picture of a, picture of c) + b

It is trained with the very objective (2) of train_critic.py but for its NLL term: there are no tokens to predict. With
--critic regression on a text model the same head reads the dialogue instead.
"""
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
from colbench.lm.load import keep_4bit_layout, keep_freed_memory, nf4
from colbench.run.errors import UserError
from colbench.run.files import seed_of
from colbench.train.heads import value_head
from colbench.train.loop import Training
from colbench.train.ranking import rank

QUESTION = ("A person asked for this web page: {request}\nHow far does the first picture, the page that was made, "
            "match the second, the page wanted?")


class Critic:
    """(1'). `advantage(request, mine, wanted)` is a scalar tensor.

    mine, wanted: paths of pictures; mine is None where the message shows no page.
    """

    def __init__(self, name: str, lora_rank: int = 0, folder: Path | None = None, load_in_4bit: bool = False):
        from transformers import AutoModelForImageTextToText, AutoProcessor
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        try:
            self.processor = AutoProcessor.from_pretrained(name)
            is_lora = folder and (folder / "adapter_config.json").exists()
            model = AutoModelForImageTextToText.from_pretrained(
                folder if folder and not is_lora else name, dtype=dtype,
                quantization_config=nf4(dtype) if load_in_4bit else None, device_map={"": device})
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = str(error).strip().split("\n")[0][:200]
            raise UserError(f"--vision-critic {name}: {reason}; "
                            "the hub id or folder of a vision-language model is wanted") from None
        keep_4bit_layout(model)
        keep_freed_memory(model)
        if is_lora:
            model = PeftModel.from_pretrained(model, folder)
        elif lora_rank and not folder:
            model = get_peft_model(
                model, LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules="all-linear"))
        self.model, self.tokens = model, 0  # tokens that went through it so far
        model.value_head = value_head(model, folder)  # A = 0 before the first step, as with a log-ratio

    def advantage(self, request: str, mine, wanted) -> torch.Tensor:
        """A of one message; differentiable."""
        pictures = [scaled(path) for path in (mine, wanted) if path]
        if not mine:  # a message without a page: black, as for the reward
            pictures.insert(0, Image.new("RGB", (224, 224), "black"))
        content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": QUESTION.format(request=request)}]
        prompt = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = self.processor(images=pictures, text=prompt, return_tensors="pt")
        inputs = inputs.to(self.model.device, dtype=self.model.dtype)
        self.tokens += inputs["input_ids"].numel()
        hidden = self.model(**inputs, output_hidden_states=True, use_cache=False).hidden_states[-1][0, -1]  # (width,)
        return self.model.value_head(hidden.float())[0]

    def parameters(self) -> list:
        """Those that are trained."""
        return [p for p in self.model.parameters() if p.requires_grad]


def turns_of(trajectory: dict, page_shown) -> list:
    """(index of the message in the dialogue, the page it shows or None) of each agent turn."""
    history = trajectory["dialogue_history"]
    return [(i, page_shown(history[:i + 1])) for i, message in enumerate(history) if message["role"] == "assistant"]


def pair_step(critic: Critic, chosen: list, rejected: list, beta: float, weight: float) -> tuple:
    """Add the gradient of (2) for one pair to the parameters; returns its loss and margin.

    chosen, rejected: lists of arguments of `advantage`, one a turn. All turns of a trajectory enter the loss through
    one sum, so its gradient with respect to each turn's A is one number: known after a pass without gradients, it is
    handed to each turn's backward pass, and only one turn at a time is held in memory.
    """
    with torch.no_grad():
        sum_chosen, sum_rejected = (sum(critic.advantage(*turn) for turn in turns) for turns in (chosen, rejected))
    margin = sum_chosen - sum_rejected
    slope = beta * torch.sigmoid(-beta * margin) * weight  # −dJ/dΣA(τ+) = dJ/dΣA(τ−)
    for turns, sign in ((chosen, -1), (rejected, 1)):
        for turn in turns:
            critic.advantage(*turn).backward(sign * slope)
    return -F.logsigmoid(beta * margin).item(), margin.item()


def train_and_rank(args, accelerator, environment, trajectory_pairs, todo: str) -> None:
    """train_critic.py with --vision-critic. Writes RUN/critic (adapter and head) and RUN/preferences.jsonl."""
    if accelerator.num_processes > 1:
        raise UserError("--vision-critic trains in one process: start it without accelerate's launcher")
    page_shown = environment(SimpleNamespace(**played_with(args, environment))).page_shown  # as when it was played
    torch.manual_seed(args.seed)  # LoRA's A matrices start at random
    with Renderer(args.trajectories.parent / "screenshots", layout=False) as renderer:
        if todo == "train":
            everything = load_trajectories(args.trajectories, environment.check_task)
            everything = of_first_tasks(everything, args.max_trajectories)
            trajectories = [t for t in everything if "reward" in t]
            pairs = trajectory_pairs(trajectories, args.pairs_per_task, args.seed)
            if not pairs:
                raise UserError(f"{args.trajectories}: no pair to learn from: no task has two trajectories "
                                "of different reward; collect more")
            critic = Critic(args.vision_critic, args.lora_rank, load_in_4bit=args.load_in_4bit)
            train(args, accelerator, critic, pairs, turns_by_trajectory(trajectories, pairs, renderer, page_shown))
        else:
            critic = Critic(args.vision_critic, folder=args.critic_folder, load_in_4bit=args.load_in_4bit)
        critic.model.eval()
        rank(args, accelerator, environment, partial(score, critic, renderer, page_shown))


def turns_by_trajectory(trajectories, pairs, renderer, page_shown) -> dict:
    """Number of a trajectory -> the arguments of `advantage` of its turns. Renders what is not there yet."""
    result = {}
    for index in tqdm(sorted({i for pair in pairs for i in pair}), desc="pages", unit="trajectory"):
        task, turns = trajectories[index]["task"], turns_of(trajectories[index], page_shown)
        wanted, *mine = renderer.render([task["ground_truth"], *(page for _, page in turns)])
        result[index] = [(task["problem_description"], picture.path, wanted.path) for picture in mine]
    return result


def train(args, accelerator, critic: Critic, pairs: list, turns: dict) -> None:
    """The loop of train_critic.py, for one process, on pictures. Writes RUN/critic."""
    names = {index: [(request, mine and Path(mine).name, Path(wanted).name) for request, mine, wanted in of]
             for index, of in turns.items()}
    optimizer = torch.optim.AdamW(critic.parameters(), lr=args.learning_rate, weight_decay=0.0)
    training = Training(accelerator, args, args.critic_folder, critic.model, optimizer, weights=[1] * len(pairs),
                        per_step=args.batch_size, data=seed_of(pairs, names), tokens=None,
                        unit=f"{args.batch_size} of {len(pairs)} pairs")
    for step in training.steps():
        batch, weight = training.batch(step)
        for a, b in (pairs[k] for k in batch):
            before = critic.tokens
            loss, margin = pair_step(critic, turns[a], turns[b], args.beta, weight)
            correct = {"rewards/accuracies": margin > 0}
            training.log.add((critic.tokens - before) // 2, loss=loss, margin=margin, **correct)
        if training.clip(1.0):
            optimizer.step()
        training.end_step(step)
    training.save(critic.processor)


@torch.no_grad()
def score(critic: Critic, renderer, page_shown, states: list[dict]) -> list[list[float]]:
    """Advantage (1') of every candidate of every state: of the page that the dialogue would show after it."""
    advantages = []
    for state in states:
        history = state["messages"][1:]
        pages = [page_shown([*history, {"role": "assistant", "content": said(text)[0]}])
                 for text in state["candidates"]]
        wanted, *mine = renderer.render([state["task"]["ground_truth"], *pages])
        request = history[0]["content"]
        advantages.append([critic.advantage(request, picture.path, wanted.path).item() for picture in mine])
    return advantages
