"""Prune the features of many images on a Ray cluster: files -> a pool of actors, each with its model -> parquet.

python examples/serving/prune_features_ray.py --ray local --method divprune --keep 0.25 --actors 2 --out pruned/
"""

import argparse

import numpy as np
import pyarrow as pa
import ray
import torch

import vtprune
from vtprune.evals import tiny

parser = argparse.ArgumentParser()
parser.add_argument("--features", help="parquet with columns id, grid [t, h, w] and features [N, D]")
parser.add_argument("--images", help="folder of images for the embedded toy to encode; its own pictures without both")
parser.add_argument("--out", default="pruned", help="folder of parquet files: id, n, idx [K] and features [K, D]")
parser.add_argument("--method", default="divprune")
parser.add_argument("--keep", type=float, default=0.25, help="share of the tokens of an image")
parser.add_argument("--recipe", help="file of a vtprune.Recipe, in place of --method and --keep")
parser.add_argument("--actors", type=int, default=1)
parser.add_argument("--ray", default="local", help="address of a cluster; local starts one")


class Prune:
    def __init__(self, recipe, encodes):
        self.recipe = vtprune.Recipe.from_json(recipe)
        self.model, self.processor = tiny.load() if encodes else (None, None)  # yours: AutoModel....from_pretrained

    def encode(self, image):
        """[h, w, 3] -> its features [N, D], as the LLM would get them."""
        pixels = self.processor.image_processor([image], return_tensors="pt")
        return self.model.get_image_features(**pixels).pooler_output[0]

    @torch.inference_mode()
    def __call__(self, rows):
        if self.model is None:
            images = [torch.tensor(x) for x in rows["features"].to_pylist()]
        else:
            images = [self.encode(np.array(x, dtype=np.uint8)) for x in rows["image"].to_pylist()]
        grids = rows["grid"].to_pylist() if "grid" in rows.column_names else None
        kept = vtprune.select(images, self.recipe, grid=grids, rows=range(len(images)))
        idx = pa.array([x.idx.numpy() for x in kept], pa.list_(pa.int64()))
        features = pa.array([list(x.features.numpy()) for x in kept], pa.list_(pa.list_(pa.float32())))
        return pa.table({"id": rows["id"], "n": [x.n for x in kept], "idx": idx, "features": features})


def main(args):
    stage = vtprune.Stage("pre_llm", vtprune.create(args.method), keep=args.keep)
    recipe = vtprune.Recipe.load(args.recipe) if args.recipe else vtprune.Recipe.of(stage)
    ray.init(args.ray)
    if args.features:
        data = ray.data.read_parquet(args.features)
    elif args.images:
        data = ray.data.read_images(args.images, include_paths=True).rename_columns({"path": "id"})
    else:
        pictures = [np.array(q.image) for q in tiny.questions(per_capability=2)]
        data = ray.data.from_items([{"id": str(i), "image": image} for i, image in enumerate(pictures)])
    # An actor that is lost is replaced, and its batches are done again. Half of a CPU each: files are read beside them.
    pool = {"compute": ray.data.ActorPoolStrategy(size=args.actors), "num_cpus": 0.5}
    made_of = [recipe.to_json(), args.features is None]
    data.map_batches(Prune, fn_constructor_args=made_of, batch_format="pyarrow", batch_size=8, **pool).write_parquet(
        args.out
    )


if __name__ == "__main__":
    main(parser.parse_args())
