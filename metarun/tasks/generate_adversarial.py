"""Few-shot generation by two players: a generator and a critic adapted to a few pictures of a new class.

Clouâtre and Demers 2019, "FIGR: Few-shot Image Generation with Reptile", https://arxiv.org/abs/1901.02199, meta-train
both with Reptile (``algo=reptile``). Tasks and test metrics are those of `metarun.tasks.generate`; the target is
`metarun.targets.adversarial`.

Where we deviate: the players take their steps at the same time, and not the generator after the critic. The paper's
inner optimizer is SGD and its outer one Adam, which ``algo.inner_optimizer`` and ``train.optimizer`` choose.
"""

from dataclasses import replace

from torch import Tensor

from metarun.contracts import Facts, Predict, Scores, Tree
from metarun.data.descriptors import kernel_distance
from metarun.errors import require
from metarun.targets.adversarial import SAMPLE_DISTANCE, Adversarial
from metarun.tasks.few_shot import Shots
from metarun.tasks.generate import Generate
from metarun.tasks.picture_pools import Dataset


class GenerateAdversarially(Generate):
    """Tasks of one class each, for a generator and a critic.

    The score of a task is the kernel distance of its queries to as many generated pictures.

    All arguments that are not listed are those of `metarun.tasks.generate.Generate`.

    Args:
        train_queries: number of query pictures in training, at least 2; null: ``queries``.
        latents: number of components of the generator's noise, at least 1.
        penalty: λ, the weight of the critic's gradient penalty, not negative.

    Raises:
        UserError: data are missing or broken.
    """

    def __init__(
        self,
        dataset: Dataset = "auto",
        path: str | None = None,
        shots: Shots = 5,
        queries: int = 10,
        train_shots: Shots | None = None,
        train_queries: int | None = None,
        latents: int = 32,
        penalty: float = 10.0,
        generated: int = 100,
        ways: int = 5,
        split: str = "auto",
        split_seed: int = 0,
        class_of: str | None = None,
        train_design: str | None = None,
        image_size: int = 20,
        channels: int | None = None,
        device: str = "cpu",
        data_dir: str = "data",
    ) -> None:
        require(latents >= 1, f"latents must be at least 1, not {latents}")
        require(penalty >= 0, f"penalty must not be negative, and it is {penalty:g}")
        require(train_queries is None or train_queries >= 2, f"train_queries must be at least 2, not {train_queries}")
        pictures = {
            **{"dataset": dataset, "path": path, "split": split, "split_seed": split_seed, "class_of": class_of},
            **{"train_design": train_design, "image_size": image_size, "channels": channels, "data_dir": data_dir},
        }
        super().__init__(
            shots=shots,
            queries=queries,
            train_shots=train_shots,
            train_queries=train_queries,
            generated=generated,
            ways=ways,
            device=device,
            **pictures,  # type: ignore[arg-type]
        )
        self.players = Adversarial(self.target.shape, latents, penalty)
        self.dataset = self.dataset.replace("generate:", "generate_adversarial:").rpartition(":")[0]
        self.converter = replace(self.converter, target=self.players)
        self.spec = replace(self.spec, target=self.players, metrics=(SAMPLE_DISTANCE,), facts=Facts())

    def loss(self, predict: Predict, data: Tree) -> tuple[Tensor, Scores]:
        """Return the loss that serves both players, and the kernel distance of what the generator made of its noise."""
        loss, made = self.players.played(predict, data)
        distance = kernel_distance(self.space(made), self.space(data["x"]), data.get("weight"))
        return loss, {SAMPLE_DISTANCE.name: distance}

    def scores(self, predict: Predict, data: Tree) -> Scores:
        """Return no further scores of single tasks; the others are of all test tasks together."""
        return {}
