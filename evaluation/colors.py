"""What a color means, in every image and plot that is drawn: one color means one thing.

Told apart by people with any kind of color vision (tests/evaluation/test_colors.py), on the heat map and on grey too:
blue lies on neither, white and green have a black rim.
"""

TRUE_DEFECT = (0, 160, 255)  # outline: the ground truth
ABOVE = (255, 255, 255)  # outline with a black rim: pixels above the pixel threshold
PEAK = (0, 255, 0)  # cross or square with a black rim: the most anomalous place
ALARM = (230, 159, 0)  # image scores above the threshold: called anomalous
USUAL = (95, 105, 115)  # image scores that are not, and curves
RIGHT, WRONG = (8, 81, 156), (190, 30, 30)  # a verdict or prediction that the ground truth confirms, or does not
PAPER, INK, SOFT, GRID = (255, 255, 255), (25, 25, 25), (110, 110, 110), (226, 226, 226)
RIM = (0, 0, 0)
