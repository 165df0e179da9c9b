"""A problem that a small router can learn: every domain has words of its own among words that all domains share."""

import itertools

import torch
from torch import Tensor

from router.features import FeatureSettings, token_features
from router.network import MetaRouter
from router.policy import RoutingPolicy
from router.router import Router
from tests.fakes import TableHiddenStates, word_tokenizer
from training.router.examples import RouterExamples, SplitExamples, split_examples
from training.router.learning import RouterRecipe
from training.router.prompts import RouterPrompts, labelled_prompts

DOMAINS = ("chat", "code", "math")
WORDS = {
    "chat": ["hello", "thanks", "joke"],
    "code": ["loop", "class", "string"],
    "math": ["sum", "root", "prime"],
    "law": ["court", "judge", "appeal"],
}
FILLERS = ["the", "a", "of", "is"]
TOKENIZER = word_tokenizer([*FILLERS, *(word for words in WORDS.values() for word in words)])
HIDDEN_STATES = TableHiddenStates(num_token_ids=len(TOKENIZER), hidden_size=12)
SETTINGS = FeatureSettings(mid_layer=1, max_tokens=16)
RECIPE = RouterRecipe(epochs=16, batch_prompts=8, learning_rate=8e-3, hidden_dim=16)
THRESHOLD = RoutingPolicy().threshold


def features_of(text: str) -> Tensor:
    return token_features(text, tokenizer=TOKENIZER, hidden_states=HIDDEN_STATES, settings=SETTINGS)


def texts_of(domain: str) -> list[str]:
    """36 different ones."""
    return [
        f"{first} {word} {second} {WORDS[domain][i % 3]}"
        for word in WORDS[domain]
        for i, (first, second) in enumerate(itertools.product(FILLERS, FILLERS[:3]))
    ]


def mixed_texts(one: str, other: str) -> list[str]:
    """18 different ones with a word of each domain."""
    return [
        f"{first} {word} {second} {another}"
        for first, second in itertools.pairwise(FILLERS)
        for word, another in itertools.product(WORDS[one], WORDS[other])
    ][:18]


def examples_of(prompts: RouterPrompts) -> RouterExamples:
    return RouterExamples(prompts, [features_of(text) for text in prompts.texts])


def labelled_examples(domains: tuple[str, ...] = DOMAINS) -> RouterExamples:
    return examples_of(labelled_prompts([(text, name) for name in domains for text in texts_of(name)], domains))


def discovered_prompts(domains: tuple[str, ...] = DOMAINS) -> RouterPrompts:
    """Singles of every domain, mixed ones of neighbours under the label of the first, and fillers that need nobody."""
    rows = [(text, name, {name}) for name in domains for text in texts_of(name)]
    pairs = [(one, other) for one, other in itertools.combinations(domains, 2)]
    rows += [(text, one, {one, other}) for one, other in pairs for text in mixed_texts(one, other)]
    rows += [(f"{first} {second}", domains[0], set()) for first in FILLERS for second in FILLERS]
    found = torch.tensor([[float(name in best) for name in domains] for _, _, best in rows])
    label = torch.tensor([[float(name == label) for name in domains] for _, label, _ in rows])
    return RouterPrompts(
        domains=domains,
        texts=[text for text, _, _ in rows],
        labels=[label for _, label, _ in rows],
        targets=0.8 * found + 0.2 * label,
        positive=found > 0,
    )


def split(examples: RouterExamples) -> SplitExamples:
    return split_examples(examples, validation_share=0.2, seed=42)


def router_of(network: MetaRouter) -> Router:
    return Router(
        network=network,
        settings=SETTINGS,
        policy=RoutingPolicy(),
        tokenizer=TOKENIZER,
        hidden_states=HIDDEN_STATES,
    )


class FixedLogits(MetaRouter):
    """Answers with given logits, a row per prompt in order, so that metrics can be counted by hand."""

    def __init__(self, logits: Tensor, domains: tuple[str, ...] = DOMAINS) -> None:
        super().__init__(1, domains, hidden_dim=2)
        self.logits = logits

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        return self.logits[features[:, 0, 0].long()]
