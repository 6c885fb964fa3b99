"""Where c, the hidden reference, is shown to a model, and where it is taken away again.

Of all that agent, critic and policy stage read, c is in the critic's prompt alone. (The simulated human knows c too:
its prompt is the environment's own.)
"""
HIDDEN_INFO = "\n\nHidden from the agent, the reference is:\n"


def with_hidden_info(messages: list[dict], reference: str) -> list[dict]:
    """The critic's view of a dialogue: c stands at the end of the system message. The dialogue stays as it was."""
    system, *rest = messages
    return [{"role": "system", "content": system["content"] + HIDDEN_INFO + reference}, *rest]


def without_hidden_info(state: dict) -> dict:
    """A state as the policy stage may read it: without the task, which holds c (and without max_turns)."""
    return {name: value for name, value in state.items() if name not in ("task", "max_turns")}
