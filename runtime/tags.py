"""What TensorBoard shows: the tag of each value and image of a run, and what it means.

TensorBoard sorts groups (what stands before a tag's "/") by name and opens the first two, hence their numbers: loss,
test or kNN, health, what the method reports, optimizer, speed, views. metrics.jsonl has the keys of this table, without
numbers. A new key needs no row: without one it is under "4_method", or under "9_other" if it is not a stats/... key.
"""

TAGS = {  # key in metrics.jsonl, or of an image, histogram or text: (tag, description in Markdown)
    "loss": ("1_loss/loss", "Mean training loss since the last point, over all processes."),
    "stats/chance_loss": (
        "1_loss/loss_at_chance",
        "The loss of constant embeddings. A loss that stays here: collapsed, or not learning.",
    ),
    "knn20_top1": (
        "2_knn/knn20_top1",
        "Share of held-out images whose class the 20 nearest training images give (temperature 0.07, as DINO).",
    ),
    "knn200_top1": (
        "2_knn/knn200_top1",
        "Share of held-out images whose class the 200 nearest training images give (temperature 0.1).",
    ),
    "few_label/knn_top1": (
        "2_few_label/knn_top1",
        "Share of test images that kNN (k=20) gets right, over labeled images per class; mean over the draws.",
    ),
    "few_label/knn_top1_std": ("2_few_label/knn_top1_std", "Its standard deviation over the draws of labeled images."),
    "few_label/logistic_top1": (
        "2_few_label/logistic_top1",
        "Share of test images that logistic regression gets right, over labeled images per class; mean over the draws.",
    ),
    "few_label/logistic_top1_std": (
        "2_few_label/logistic_top1_std",
        "Its standard deviation over the draws of labeled images.",
    ),
    "semi/kept": ("1_loss/kept", "Share of a step's unlabelled images whose pseudo-label counts."),
    "semi/right": (
        "1_loss/right",
        "Share of those pseudo-labels that are right; labels nobody learns from say so.",
    ),
    "validation/loss": ("2_validation/loss", "Loss of the validation images, which plateau and early_stopping follow."),
    "validation/top1": ("2_validation/top1", "Share of the validation images whose class is the likeliest one."),
    "validation/top5": ("2_validation/top5", "Share of them whose class is among the five likeliest ones."),
    "validation/macro_f1": ("2_validation/macro_f1", "Mean over the classes of F1, so that rare ones count as much."),
    "curves": ("2_test/curves", "ROC and precision-recall curve of the test images; the dot is the threshold."),
    "heatmaps": (
        "2_test/heatmaps",
        "The most telling test images: misses, false alarms, the strongest and a typical one of each defect.",
    ),
    "neighbors": ("2_test/neighbors", "The most anomalous patch of test images beside the nearest training patch."),
    "scores": ("2_test/scores", "Image scores of the training normals and of each kind of test image."),
    "precision_recall": ("2_test/precision_recall", "Precision over recall of the test images, scores scaled to 0..1."),
    "confusion": ("2_test/confusion", "True classes in rows, predicted classes in columns."),
    "confused": ("2_test/confused", "The most confused pairs of classes, each with test images: truth -> prediction."),
    "points": ("2_test/points", "Images as points of a plane: what lies near has similar features."),
    "thumbnails": ("2_test/thumbnails", "The images where t-SNE puts them."),
    "segments": ("2_test/segments", "Clusters of patches over test images, in colors; true defects are outlined."),
    "landscape": (
        "2_landscape/contours",
        "Loss around the weights of runs, on one scale; the cross is the run itself.",
    ),
    "landscape/curves": ("2_landscape/curves", "Loss along one direction; at 0 the run itself."),
    "landscape/table": ("landscape", "Loss, accuracy and sharpness of each run."),
    "defects": ("2_test/defects", "Synthetic defects on training images, their masks outlined."),
    "attention": (
        "2_test/attention",
        "A vision transformer's attention: heads of the last block, 60 % of each outlined, their mean, and rollout.",
    ),
    "gradcam": ("2_test/gradcam", "Where in test images a class, a similarity or an anomaly score comes from."),
    "features/std": (
        "3_health/features_std",
        "In eval mode, as kNN sees the backbone's features: 1 healthy, 0 if all images have the same features.",
    ),
    "features/effective_rank": (
        "3_health/features_effective_rank",
        "Directions that the backbone's features use in eval mode: tens are healthy, 1 is a line.",
    ),
    "embedding/std": (
        "3_health/embedding_std",
        "Spread of the normalized embeddings: 1 healthy, 0 if all images have the same embedding (collapse).",
    ),
    "embedding/effective_rank": (
        "3_health/embedding_effective_rank",
        "Directions that the embeddings use (RankMe): tens and rising are healthy, near 1 all lie on a line.",
    ),
    "embedding/positive_cosine": (
        "3_health/cosine_positive",
        "Cosine of two views of one image. Far above the negatives' is healthy; both near 1 are a collapse.",
    ),
    "embedding/negative_cosine": (
        "3_health/cosine_negative",
        "Cosine of views of different images. Far below the positives' is healthy; equal to it, nothing is learned.",
    ),
    "embedding/alignment": (
        "3_health/embedding_alignment",
        "Squared distance of two views of one image: should fall, while uniformity stays low.",
    ),
    "embedding/uniformity": (
        "3_health/embedding_uniformity",
        "How evenly embeddings cover the sphere: -2 to -4 healthy, 0 collapsed.",
    ),
    "stats/teacher_entropy_share": (
        "4_method/teacher_entropy_share",
        "Entropy of the teacher's output divided by its maximum: 1 uniform, 0 one prototype; both are a collapse.",
    ),
    "stats/prototypes_used": (
        "4_method/prototypes_used",
        "How evenly images spread over the teacher's prototypes: 1 all different, near 0 one prototype for all.",
    ),
    "stats/teacher_temperature": (
        "4_method/teacher_temperature",
        "Softmax temperature of the teacher; it warms up.",
    ),
    "stats/position_accuracy": (
        "4_method/position_accuracy",
        "Share of patch positions that are guessed right; chance is 1/8.",
    ),
    "stats/task_loss": ("4_method/task_loss", "PsCo's supervised part of the loss, on pseudo-labels."),
    "stats/moco_loss": ("4_method/moco_loss", "PsCo's contrastive part of the loss, MoCo's."),
    "stats/distinct_shots": ("4_method/distinct_shots", "PsCo: 1 if no two images share a shot from the queue."),
    "stats/spd": ("4_method/spd", "SPot-the-Difference term, before its weight."),
    "stats/defect_cosine": ("4_method/defect_cosine", "Cosine of an image and its defective copy; should fall."),
    "stats/positive_distance": ("4_method/positive_distance", "Triplet: distance of anchor and positive."),
    "stats/negative_distance": ("4_method/negative_distance", "Triplet: distance of anchor and negative."),
    "stats/active": ("4_method/active", "Share of triplets that still cost something."),
    "stats/invariance": ("4_method/invariance", "VICReg: squared distance of the views."),
    "stats/variance": ("4_method/variance", "VICReg: how far standard deviations are below 1; 0 is best."),
    "stats/covariance": ("4_method/covariance", "VICReg: squared covariances between dimensions; 0 is best."),
    "stats/accuracy": ("4_method/accuracy", "CutPaste: share of images, with and without paste, told correctly."),
    "stats/spread": ("4_method/spread", "RegAD: variance of the normalized features; 0 is a collapse."),
    "stats/discrepancy_normal": ("4_method/discrepancy_normal", "CDO: expert against apprentice where all is normal."),
    "stats/discrepancy_abnormal": ("4_method/discrepancy_abnormal", "CDO: expert against apprentice in the noise."),
    "stats/intra_loss": ("4_method/intra_loss", "STEGO: loss of an image with itself, before its weight."),
    "stats/intra_feature_cosine": (
        "4_method/intra_feature_cosine",
        "STEGO: mean cosine of features of an image with itself.",
    ),
    "stats/intra_code_cosine": ("4_method/intra_code_cosine", "STEGO: mean cosine of codes of an image with itself."),
    "stats/inter_loss": ("4_method/inter_loss", "STEGO: loss of an image with one most like it, before its weight."),
    "stats/inter_feature_cosine": (
        "4_method/inter_feature_cosine",
        "STEGO: mean cosine of features of an image with one most like it.",
    ),
    "stats/inter_code_cosine": (
        "4_method/inter_code_cosine",
        "STEGO: mean cosine of codes of an image with one most like it.",
    ),
    "stats/negative_loss": (
        "4_method/negative_loss",
        "STEGO: loss of an image with others at random, before its weight.",
    ),
    "stats/negative_feature_cosine": (
        "4_method/negative_feature_cosine",
        "STEGO: mean cosine of features of an image with others at random.",
    ),
    "stats/negative_code_cosine": (
        "4_method/negative_code_cosine",
        "STEGO: mean cosine of codes of an image with others at random.",
    ),
    "stats/cluster_loss": (
        "4_method/cluster_loss",
        "STEGO: minus the mean cosine of a code with its cluster's center.",
    ),
    "lr": ("5_optimizer/lr", "Learning rate of the last step."),
    "grad_norm": ("5_optimizer/grad_norm", "Norm of all gradients in the last step, before clipping."),
    "epoch": ("5_optimizer/epoch", "Epochs done."),
    "layers": ("5_optimizer/layers", "Layers of the backbone, from the top, that learn beside the classifier."),
    "speed/images_per_second": ("6_speed/images_per_second", "Training images per second, over all processes."),
    "speed/data_wait_share": ("6_speed/data_wait_share", "Share of the time spent waiting for data; 0 is best."),
    "config": ("config", "The resolved configuration."),
    "warning": ("warning", "What was wrong at three consecutive points, and what to do."),
    "per defect": ("per defect", "Each defect against the good test images of its category, with 95 % intervals."),
    "per category": ("per category", "One detector on each category, their mean, and all images together."),
    "per lighting": ("per lighting", "The test images of each lighting, their mean, and all images together."),
    "compare": ("compare", "Paired bootstrap between runs."),
    "data": ("data", "What eval.py task=data has found: the report, whose page is report.html."),
    "describe": ("describe", "Size and speed of backbones."),
    "robustness": ("robustness", "Errors under each corruption, by severity, and when the camera moves a little."),
}

FAMILIES = {  # keys that begin alike, as the name of a defect or the number of a page is not known before
    "heatmaps/": ("2_test/heatmaps ", TAGS["heatmaps"][1]),
    "neighbors/": ("2_test/neighbors ", TAGS["neighbors"][1]),
    "correspondence/": ("2_test/correspondence ", "Patches of two images that are each other's nearest ones."),
    "data/": ("2_data/", "Images of the data set: of each class, copies, and odd ones, the worst first."),
    "robustness/false_alarms_": (
        "2_robustness_false_alarms/",
        "Share of good test images above the stored threshold under a corruption, over its severity; 0: as they are.",
    ),
    "robustness/": ("2_robustness/", "Error under a corruption, over its severity as the step; 0: images as they are."),
    "landscape/surface/": (
        "2_landscape/",
        "The loss as a height, in logarithms where the contours are; all runs on one scale.",
    ),
    "views/": ("7_views/", "Training images in rows; in columns the image itself and what the network sees of it."),
    "scores/": ("8_scores/", "Histogram of the image scores of one kind of image."),
    "stats/loss_stage": ("4_method/loss_stage", "The loss of one stage of maps."),
    "stats/probability_": ("4_method/probability_", "NSA: mean predicted probability of a defect on such pixels."),
    "stats/log_density_stage": ("4_method/log_density_stage", "CFlow: mean log density per channel of a stage."),
    "stats/": ("4_method/", "A value that the method itself reports: see its file in models/."),
    "": ("9_other/", "A value of a script of your own: runtime/tags.py has room for its description."),
}

CHARTS = {  # TensorBoard's Custom Scalars: several curves in one chart, {category: {title: keys}}
    "loss": {"loss, and the loss of constant embeddings": ["loss", "stats/chance_loss"]},
    "kNN": {"kNN accuracy on held-out images": ["knn20_top1", "knn200_top1"]},
    "health": {
        "cosine of two views of one image, and of different images": [
            "embedding/positive_cosine",
            "embedding/negative_cosine",
        ],
        "spread of embeddings in training, of features in eval mode": ["embedding/std", "features/std"],
    },
}

HEADLINES = ("image_auroc", "pixel_auroc", "aupro", "top1", "knn20_top1")  # the first columns of the table of runs


def tag_of(key: str) -> tuple[str, str]:
    """(tag, description) of a key."""
    if key in TAGS:
        return TAGS[key]
    family = next(start for start in FAMILIES if key.startswith(start))  # the last one is any
    tag, description = FAMILIES[family]
    return tag + key.removeprefix(family), description


def layout() -> dict:
    """`CHARTS` as SummaryWriter.add_custom_scalars takes it."""
    return {
        category: {title: ["Multiline", [f"^{TAGS[key][0]}$" for key in keys]] for title, keys in charts.items()}
        for category, charts in CHARTS.items()
    }
