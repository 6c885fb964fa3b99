"""Who plays in evaluate.py: base model and policies on one set of weights, and served models."""
from colbench.lm.adapters import has_adapters
from colbench.lm.load import load_model, load_tokenizer, put_adapter
from colbench.lm.sampling import LocalChat
from colbench.lm.server import ServerChat, is_address


class Agents:
    """The base model, loaded once, with the adapters of all policies on it.

    model: the base model, in a PeftModel once there is an adapter; None if only servers play.
    """

    def __init__(self, policies: list[str], model: str, load_in_4bit: bool, batch_tokens: int):
        self.model = self.tokenizer = None
        self.batch_tokens = batch_tokens
        if not all(map(is_address, policies)):
            self.tokenizer = load_tokenizer(model)
            self.model = load_model(model, load_in_4bit)

    def load(self, folder: str):
        """The model that a training script wrote: adapters on the base model, or all weights."""
        model = put_adapter(self.model, folder)
        if has_adapters(model):
            self.model = model
        return model

    def agent(self, policy: str):
        """The agent for "base", the folder of a policy, or a server's address."""
        if is_address(policy):
            server = ServerChat(policy)
            server.check()
            return server
        model = self.model if policy == "base" else self.load(policy)
        return LocalChat(model, self.tokenizer, adapters=policy != "base",
                         batch_tokens=self.batch_tokens)

    def base(self) -> LocalChat | None:
        """The base model as a speaker, for a human that it plays."""
        if self.model is None:
            return None
        return LocalChat(self.model, self.tokenizer, adapters=False,
                         batch_tokens=self.batch_tokens)
