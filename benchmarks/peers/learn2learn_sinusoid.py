"""MAML on the sinusoid with learn2learn, in the style of its examples: a clone of the module for each task."""

import torch

from benchmarks.peers import work_of_arguments
from benchmarks.peers.torch_sinusoid import trained
from benchmarks.torch_peers import learn2learn


def main() -> None:
    """Train, select, test and print."""
    torch.set_num_threads(1)
    work = work_of_arguments()
    print(f"score {trained(work, learn2learn(work.training, 'cpu')):.4f}")


if __name__ == "__main__":
    main()
