"""Our engines and their baselines on one network, in one process, taking turns: ``skipnet-rt benchmark`` as a script.

    pip install onnx onnxruntime openvino matplotlib
    python benchmarks/compare.py --arch cifar10_rnn_gate_110 --output benchmarks/results

Prints a table with the share of the FLOP ceiling for each batch size, writes JSON and a plot; docs/cli.md says what
they mean. ``--help`` lists the options.
"""

import sys

from skipnet_rt.cli.app import main

if __name__ == "__main__":
    main(["benchmark", *sys.argv[1:]])
