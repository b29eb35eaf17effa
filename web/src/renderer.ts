/**
 * Draws a cut with WebGL 2, as flexgs trains it: EWA splatting with 0.3 square pixels added to each projected
 * Gaussian (3DGS, Kerbl et al. 2023), blended back to front. The arrays of a cut are its textures.
 */

import type { Cut } from "./index.js";
import { harmonics } from "./model.js";

/** What is seen: a pose, and focal lengths and principal point in pixels of the canvas. */
export interface View {
  /** World to camera, [4, 4] row by row; x right, y down, z forward. */
  viewmat: ArrayLike<number>;
  fx: number;
  fy: number;
  cx: number;
  cy: number;
  near: number;
}

const WIDTH = 2048; // texels of a row

const VERTEX = `#version 300 es
precision highp float;
precision highp int;
precision highp sampler2D;
uniform sampler2D means, quats, scales, opacities, sh0, shN;
uniform mat3 R;      // world to camera
uniform vec3 t, eye;
uniform vec2 focal, centre, size;
uniform float near;
uniform int K, perRow;
in vec2 corner;
in uint index;
out vec2 offset;
out vec4 colour;

vec3 harmonic(int k) {
  int row = int(index) / perRow;
  return texelFetch(shN, ivec2((int(index) - row * perRow) * K + k, row), 0).rgb;
}

void main() {
  ivec2 at = ivec2(index % ${WIDTH}u, index / ${WIDTH}u);
  gl_Position = vec4(0, 0, 2, 1); // nowhere
  vec3 mean = texelFetch(means, at, 0).rgb, p = R * mean + t;
  float opacity = 1.0 / (1.0 + exp(-texelFetch(opacities, at, 0).r));
  if (p.z < near || opacity < 1.0 / 255.0) return;

  vec4 q = normalize(texelFetch(quats, at, 0));
  float w = q.x, x = q.y, y = q.z, z = q.w;
  mat3 turn = mat3(1.0 - 2.0 * (y * y + z * z), 2.0 * (x * y + w * z), 2.0 * (x * z - w * y),
                   2.0 * (x * y - w * z), 1.0 - 2.0 * (x * x + z * z), 2.0 * (y * z + w * x),
                   2.0 * (x * z + w * y), 2.0 * (y * z - w * x), 1.0 - 2.0 * (x * x + y * y));
  vec3 s = exp(texelFetch(scales, at, 0).rgb);
  vec2 low = -(centre + 0.15 * size) / focal, high = (size - centre + 0.15 * size) / focal;
  vec2 ray = clamp(p.xy / p.z, low, high);
  mat3 J = mat3(focal.x / p.z, 0, 0, 0, focal.y / p.z, 0, -focal * ray / p.z, 0);
  mat3 M = J * R * turn * mat3(s.x, 0, 0, 0, s.y, 0, 0, 0, s.z);
  mat3 cov = M * transpose(M);
  float a = cov[0][0] + 0.3, b = cov[0][1], d = cov[1][1] + 0.3;
  float middle = 0.5 * (a + d), root = length(vec2(0.5 * (a - d), b));
  vec2 deviation = sqrt(max(vec2(middle + root, middle - root), 1e-9));
  vec2 axis = root < 1e-9 ? vec2(1, 0) : normalize(a > d ? vec2(middle + root - d, b) : vec2(b, middle + root - a));
  float reach = min(sqrt(2.0 * log(255.0 * opacity)), 3.33);
  offset = reach * corner;
  vec2 pixel = focal * p.xy / p.z + centre + axis * offset.x * deviation.x +
               vec2(-axis.y, axis.x) * offset.y * deviation.y;
  gl_Position = vec4(2.0 * pixel / size - 1.0, 0, 1) * vec4(1, -1, 1, 1);

  vec3 rgb = 0.5 + 0.28209479177387814 * texelFetch(sh0, at, 0).rgb;
  vec3 v = normalize(mean - eye);
  x = v.x, y = v.y, z = v.z;
  if (K > 0) rgb += 0.4886025119029199 * (-y * harmonic(0) + z * harmonic(1) - x * harmonic(2));
  if (K > 3) rgb += 1.0925484305920792 * (x * y * harmonic(3) - y * z * harmonic(4) - x * z * harmonic(6)) +
                    0.31539156525252005 * (3.0 * z * z - 1.0) * harmonic(5) +
                    0.5462742152960396 * (x * x - y * y) * harmonic(7);
  if (K > 8) rgb += -0.5900435899266435 * (y * (3.0 * x * x - y * y) * harmonic(8) + x * (x * x - 3.0 * y * y) * harmonic(14)) +
                    2.890611442640554 * x * y * z * harmonic(9) + 1.445305721320277 * z * (x * x - y * y) * harmonic(13) +
                    0.3731763325901154 * z * (5.0 * z * z - 3.0) * harmonic(11) -
                    0.4570457994644658 * (5.0 * z * z - 1.0) * (y * harmonic(10) + x * harmonic(12));
  colour = vec4(max(rgb, 0.0), opacity);
}`;

const FRAGMENT = `#version 300 es
precision highp float;
in vec2 offset;
in vec4 colour;
out vec4 result;
void main() {
  float alpha = min(colour.a * exp(-0.5 * dot(offset, offset)), 0.999);
  if (alpha < 1.0 / 255.0) discard;
  result = vec4(colour.rgb * alpha, alpha);
}`;

const TEXTURES = ["means", "quats", "scales", "opacities", "sh0", "shN"] as const;

export const LOST = "this browser has lost its graphics (WebGL); the picture comes back with them";

export class Renderer {
  /** Number of Gaussians of the cut that is drawn. */
  count = 0;
  readonly #gl: WebGL2RenderingContext;
  readonly #program: WebGLProgram;
  readonly #textures = new Map<string, { texture: WebGLTexture; room: number }>();
  #harmonics = 0;
  #perRow = 1;
  #ordered = 0; // number of Gaussians in the order that is drawn
  #cut?: Cut;

  /** An Error where the browser has no WebGL 2, or not now; once it was lost, a new Renderer is needed. */
  constructor(private canvas: HTMLCanvasElement) {
    const gl = canvas.getContext("webgl2", { antialias: false, alpha: false });
    if (!gl) throw new Error("this browser shows no WebGL 2, which the model is drawn with; try another one");
    if (gl.isContextLost()) throw new Error(LOST);
    this.#gl = gl;
    const program = this.#program = gl.createProgram()!;
    for (const [kind, text] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, FRAGMENT]] as const) {
      const shader = gl.createShader(kind)!;
      gl.shaderSource(shader, text);
      gl.compileShader(shader);
      gl.attachShader(program, shader);
    }
    gl.bindAttribLocation(program, 0, "corner");
    gl.bindAttribLocation(program, 1, "index");
    gl.linkProgram(program);
    gl.useProgram(program);
    if (!gl.isContextLost() && !gl.getProgramParameter(program, gl.LINK_STATUS)) {
      throw new Error(`this browser cannot compile the viewer's shader: ${gl.getProgramInfoLog(program)}`);
    }
    TEXTURES.forEach((name, unit) => gl.uniform1i(gl.getUniformLocation(program, name), unit));
    gl.bindBuffer(gl.ARRAY_BUFFER, gl.createBuffer());
    gl.bufferData(gl.ARRAY_BUFFER, new Float32Array([-1, -1, 1, -1, -1, 1, 1, 1]), gl.STATIC_DRAW);
    gl.enableVertexAttribArray(0);
    gl.vertexAttribPointer(0, 2, gl.FLOAT, false, 0, 0);
    gl.bindBuffer(gl.ARRAY_BUFFER, gl.createBuffer()); // of the order
    gl.enableVertexAttribArray(1);
    gl.vertexAttribIPointer(1, 1, gl.UNSIGNED_INT, 0, 0);
    gl.vertexAttribDivisor(1, 1);
    gl.enable(gl.BLEND);
    gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
  }

  /** Take over a cut; it is drawn once order() has been given an order for it. */
  show(cut: Cut): void {
    const gl = this.#gl, K = harmonics(cut.shDegree);
    this.#cut = cut;
    this.count = cut.count;
    this.#upload("means", cut.means, cut.count, WIDTH, gl.RGB32F, gl.RGB);
    this.#upload("quats", cut.quats, cut.count, WIDTH, gl.RGBA32F, gl.RGBA);
    this.#upload("scales", cut.scales, cut.count, WIDTH, gl.RGB32F, gl.RGB);
    this.#upload("opacities", cut.opacities, cut.count, WIDTH, gl.R32F, gl.RED);
    this.#upload("sh0", cut.sh0, cut.count, WIDTH, gl.RGB32F, gl.RGB);
    this.#perRow = Math.floor(WIDTH / Math.max(1, K));
    if (K && cut.count > this.#harmonics) { // harmonics are those of all cuts
      this.#upload("shN", cut.shN, cut.count, this.#perRow, gl.RGB16F, gl.RGB, K);
      this.#harmonics = cut.count;
    } else if (!K) {
      this.#upload("shN", new Float32Array(3), 1, 1, gl.RGB16F, gl.RGB);
    }
  }

  /** Forget the cut, as before those of another model, whose harmonics may be laid out in another way. */
  clear(): void {
    for (const { texture } of this.#textures.values()) this.#gl.deleteTexture(texture);
    this.#textures.clear();
    this.#cut = undefined;
    this.count = this.#harmonics = this.#ordered = 0;
  }

  /** Say in which order the Gaussians are drawn, the farthest first. */
  order(indices: Uint32Array): void {
    this.#gl.bufferData(this.#gl.ARRAY_BUFFER, indices, this.#gl.DYNAMIC_DRAW);
    this.#ordered = indices.length;
  }

  /** Draw the view on a background colour. */
  draw({ viewmat, fx, fy, cx, cy, near }: View, background: ArrayLike<number>): void {
    const gl = this.#gl, { width, height } = this.canvas, m = viewmat as number[];
    const at = (name: string) => gl.getUniformLocation(this.#program, name);
    const t = [m[3]!, m[7]!, m[11]!];
    gl.viewport(0, 0, width, height);
    gl.clearColor(background[0]!, background[1]!, background[2]!, 1);
    gl.clear(gl.COLOR_BUFFER_BIT);
    if (!this.#ordered) return;
    gl.uniformMatrix3fv(at("R"), false, [m[0]!, m[4]!, m[8]!, m[1]!, m[5]!, m[9]!, m[2]!, m[6]!, m[10]!]);
    gl.uniform3fv(at("t"), t);
    gl.uniform3fv(at("eye"), [0, 1, 2].map((i) => -(m[i]! * t[0]! + m[4 + i]! * t[1]! + m[8 + i]! * t[2]!)));
    gl.uniform2f(at("focal"), fx, fy);
    gl.uniform2f(at("centre"), cx, cy);
    gl.uniform2f(at("size"), width, height);
    gl.uniform1f(at("near"), near);
    gl.uniform1i(at("K"), harmonics(this.#cut!.shDegree));
    gl.uniform1i(at("perRow"), this.#perRow);
    gl.drawArraysInstanced(gl.TRIANGLE_STRIP, 0, 4, this.#ordered);
  }

  /** Write `count` items of `texels` texels each into a texture that has `perRow` of them in a row. */
  #upload(name: string, values: Float32Array, count: number, perRow: number, internal: number, format: number,
          texels = 1): void {
    const gl = this.#gl, rows = Math.floor(count / perRow), width = perRow * texels;
    gl.activeTexture(gl.TEXTURE0 + TEXTURES.indexOf(name as (typeof TEXTURES)[number]));
    gl.pixelStorei(gl.UNPACK_ALIGNMENT, 4);
    const before = this.#textures.get(name);
    if (!before || before.room < count) {
      gl.deleteTexture(before?.texture ?? null);
      const texture = gl.createTexture()!, height = Math.ceil(count / perRow);
      gl.bindTexture(gl.TEXTURE_2D, texture);
      gl.texStorage2D(gl.TEXTURE_2D, 1, internal, width, height);
      for (const side of [gl.TEXTURE_MIN_FILTER, gl.TEXTURE_MAG_FILTER]) gl.texParameteri(gl.TEXTURE_2D, side, gl.NEAREST);
      this.#textures.set(name, { texture, room: height * perRow });
    }
    const each = values.length / count;
    if (rows) gl.texSubImage2D(gl.TEXTURE_2D, 0, 0, 0, width, rows, format, gl.FLOAT, values.subarray(0, rows * perRow * each));
    if (count > rows * perRow) {
      gl.texSubImage2D(gl.TEXTURE_2D, 0, 0, rows, (count - rows * perRow) * texels, 1, format, gl.FLOAT,
        values.subarray(rows * perRow * each));
    }
  }
}
