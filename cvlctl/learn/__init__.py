"""`cvlctl pretrain` and `cvlctl finetune`: networks, losses, algorithms, and the loop that trains them."""
