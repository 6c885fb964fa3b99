"""Twenty questions, an example of a custom environment in one file.

Somebody thinks of a word. The agent asks yes-or-no questions, then says the word.

    for script in collect train_critic train_policy evaluate; do
        python $script.py --env tests/twenty_questions.py
    done

The embedded model learned a different game and never wins this one; use --model for one that can.
"""
import random
import re

from colbench.env.base import Environment, percent

WORDS = ("acorn apple bridge candle dolphin engine feather guitar hammer island jacket kettle "
         "ladder mirror needle orchard pencil quilt rabbit saddle teapot umbrella violin window "
         "yoghurt zebra anchor basket desk").split()


class Answerer:
    """The human. Only `reply` is required; `repeatable`: equal calls get equal replies."""

    repeatable = True

    def reply(self, tasks, histories, seeds):
        """One reply per dialogue, to its last message."""
        return [self.answer(task["ground_truth"], history[-1]["content"].lower())
                for task, history in zip(tasks, histories)]

    def answer(self, word, question):
        """Understands "Is it WORD?", "Does it have the letter X?", "Is it more than N letters?"."""
        if word in question:
            return "Yes, that is it!"
        if letter := re.search(r"letter ([a-z])\b", question):
            return "Yes." if letter[1] in word else "No."
        if number := re.search(r"more than (\d+) letters", question):
            return "Yes." if len(word) > int(number[1]) else "No."
        return "No."


class TwentyQuestions(Environment):
    """Reward: 1 for the word, else a tenth of the share of its letters that the answer has."""

    prompt = ("Somebody thinks of a word. You have {max_turns} messages. Ask one question at a "
              "time that can be answered by yes or no; when you know the word, say it behind "
              "\"I WANT TO ANSWER:\".")
    presets = {
        "collect": {"tiny": dict(tasks="train", n_tasks=18, k=6, candidate_share=0.3)},
        "evaluate": {"tiny": dict(tasks="test", n_tasks=10)},
    }
    columns = {"found": percent("success")} | Environment.columns

    @classmethod
    def tasks(cls, source, limit=None):
        """"train" and "test" have different words; any other source is a file of tasks."""
        if source not in ("train", "test"):
            return super().tasks(source, limit)
        words = random.Random(0).sample(WORDS, len(WORDS))
        words = words[:18] if source == "train" else words[18:]
        return [{"id": f"word-{word}",
                 "problem_description": f"I am thinking of a word with {len(word)} letters.",
                 "ground_truth": word} for word in words[:limit]]

    def human(self, spec, chat=None):
        """Always the same; `spec` is ignored."""
        return Answerer()

    def score(self, pairs):
        """(reward, details to keep) per (task, answer)."""
        for task, answer in pairs:
            word, said = task["ground_truth"], answer.lower()
            share = sum(letter in said for letter in set(word)) / len(set(word))
            reward = 1.0 if re.search(rf"\b{word}\b", said) else share / 10
            yield reward, {"letters": round(share, 3)}
