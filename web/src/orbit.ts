/** A camera that turns about a target: x right, y down, z forward. */

type Vector = [number, number, number];
const dot = (a: Vector, b: Vector) => a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
const along = (a: Vector, b: Vector, by: number): Vector => [a[0] + by * b[0], a[1] + by * b[1], a[2] + by * b[2]];
export const unit = (a: Vector): Vector => along([0, 0, 0], a, 1 / (Math.hypot(...a) || 1));
const cross = (a: Vector, b: Vector): Vector =>
  [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]];

/** Rotate a vector about a unit axis by an angle (Rodrigues). */
function turned(a: Vector, axis: Vector, angle: number): Vector {
  const c = Math.cos(angle), s = Math.sin(angle);
  return along(along(along([0, 0, 0], a, c), cross(axis, a), s), axis, dot(axis, a) * (1 - c));
}

export class Orbit {
  /** Directions of the camera's x, y and z in the world. */
  axes: [Vector, Vector, Vector] = [[1, 0, 0], [0, 1, 0], [0, 0, 1]];
  target: Vector = [0, 0, 0];
  distance = 1;
  up: Vector = [0, -1, 0];

  /** Stand where a camera stands, and turn about the point that is so far ahead of it. */
  place(viewmat: ArrayLike<number>, distance: number): void {
    const row = (i: number): Vector => [viewmat[4 * i]!, viewmat[4 * i + 1]!, viewmat[4 * i + 2]!];
    this.axes = [row(0), row(1), row(2)];
    let eye: Vector = [0, 0, 0];
    this.axes.forEach((axis, i) => { eye = along(eye, axis, -viewmat[4 * i + 3]!); });
    this.target = along(eye, this.axes[2], distance);
    this.distance = distance;
  }

  /** World to camera, [4, 4] row by row. */
  get viewmat(): number[] {
    const eye = along(this.target, this.axes[2], -this.distance);
    return [...this.axes.flatMap((axis) => [...axis, -dot(axis, eye)]), 0, 0, 0, 1];
  }

  /** Turn about the target by angles to the right and upwards, but not over the top. */
  turn(right: number, upwards: number): void {
    const tilted = this.axes.map((axis) => turned(axis, this.axes[0], upwards)) as typeof this.axes;
    const steep = Math.abs(dot(tilted[2], this.up));
    if (steep < 0.98 || steep < Math.abs(dot(this.axes[2], this.up))) this.axes = tilted;
    this.axes = this.axes.map((axis) => turned(axis, this.up, right)) as typeof this.axes;
  }

  /** Move sideways and down by shares of the distance to the target. */
  pan(right: number, down: number): void {
    this.target = along(along(this.target, this.axes[0], right * this.distance), this.axes[1], down * this.distance);
  }

  zoom(factor: number): void {
    this.distance *= factor;
  }
}
