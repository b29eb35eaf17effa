/** What stands in a <flexgs-view>: the picture, its controls and their looks. */

export const PANEL: string = `
<style>
  :host { display: block; position: relative; overflow: clip; aspect-ratio: 16 / 9; background: #000; color: #eee;
    font: 14px/1.4 system-ui, sans-serif; --split: 50%; }
  :host([hidden]), [hidden] { display: none !important; }
  slot, canvas, #photo, #message { position: absolute; inset: 0; width: 100%; height: 100%; }
  slot { display: block; }
  ::slotted(img) { width: 100%; height: 100%; object-fit: contain; }
  canvas { opacity: 0; touch-action: none; cursor: grab; outline-offset: -2px; }
  canvas:active { cursor: grabbing; }
  :host([drawn]) canvas { opacity: 1; }
  :host([drawn]) slot { visibility: hidden; }
  #photo, #split, .label, #line { display: none; }
  :host([comparing]) #photo { display: block; object-fit: contain; pointer-events: none; clip-path: inset(0 0 0 var(--split)); }
  :host([comparing]) #line { display: block; position: absolute; top: 0; bottom: 0; left: calc(var(--split) - 1px); width: 2px;
    background: #fff; pointer-events: none; }
  :host([comparing]) .label { display: flex; gap: 8px; align-items: center; position: absolute; top: 10px; left: 50%; padding: 4px 8px;
    transform: translateX(-50%); border-radius: 8px; background: #000b; white-space: nowrap; }
  :host([comparing]) #split { display: block; position: absolute; left: 0; top: 50%; width: 100%; height: 44px; margin: -22px 0 0;
    background: none; appearance: none; pointer-events: none; }
  #split::-webkit-slider-thumb { appearance: none; pointer-events: auto; width: 32px; height: 44px; border-radius: 8px; background: #2a7de1;
    cursor: ew-resize; border: 2px solid #fff; }
  #split::-moz-range-thumb { pointer-events: auto; width: 28px; height: 40px; border-radius: 8px; background: #2a7de1; cursor: ew-resize;
    border: 2px solid #fff; }
  #bar { position: absolute; top: 0; left: 0; height: 3px; width: 0; background: #2a7de1; }
  #panel { position: absolute; left: 8px; right: 8px; bottom: 8px; display: flex; flex-wrap: wrap; gap: 6px 10px;
    align-items: center; padding: 8px 10px; border-radius: 10px; background: #000b; box-sizing: border-box; }
  #detail { flex: 1 1 220px; display: flex; gap: 8px; align-items: center; min-width: 0; }
  #ratio { flex: 1; min-width: 60px; accent-color: #2a7de1; height: 28px; margin: 0; }
  #about { flex: 0 1 auto; min-width: 18em; font-variant-numeric: tabular-nums; white-space: nowrap; }
  #buttons { display: flex; gap: 6px; flex-wrap: wrap; }
  button { min-height: 32px; padding: 4px 10px; border: 1px solid #666; border-radius: 7px; color: inherit; background: #222;
    font: inherit; cursor: pointer; }
  button:hover { background: #3a3a3a; }
  button[aria-pressed="true"] { background: #2a7de1; border-color: #2a7de1; color: #fff; }
  #compare[disabled] { visibility: hidden; }
  .mouse, .finger { display: none; }
  @media (hover: hover) { .mouse { display: inline; } }
  @media (hover: none) { .finger { display: inline; } }
  #hint { position: absolute; top: 10px; left: 0; right: 0; text-align: center; pointer-events: none; text-shadow: 0 0 4px #000;
    transition: opacity .4s; padding: 0 12px; }
  @media (prefers-reduced-motion: reduce) { #hint { transition: none; } }
  :host(:not([drawn])) #hint, :host([touched]) #hint, :host([comparing]) #hint { opacity: 0; }
  #message { display: flex; flex-direction: column; gap: 10px; align-items: center; justify-content: center; inset: 0 0 64px;
    height: auto; padding: 16px; box-sizing: border-box; pointer-events: none; }
  #text { max-width: 34em; padding: 8px 14px; border-radius: 8px; background: #7a1f1ff0; overflow-wrap: anywhere; white-space: pre-line; }
  #again { pointer-events: auto; }
</style>
<slot></slot>
<canvas tabindex="0" aria-label="3D model: arrow keys turn it, plus and minus zoom"></canvas>
<img id="photo" alt="photograph of this view">
<div id="line"></div>
<div class="label">
  <button id="before" title="the photograph before (P)" aria-label="previous photograph">‹</button>
  <span id="which"></span>
  <button id="next" title="the next photograph (N)" aria-label="next photograph">›</button>
</div>
<input id="split" type="range" min="0" max="100" step="0.5" value="50" aria-label="how far the model reaches over the photograph">
<div id="hint"><span
  class="mouse">drag to turn · wheel to zoom · right button to move</span><span
  class="finger">drag to turn · pinch to zoom · two fingers to move</span></div>
<div id="bar"></div>
<div id="message" role="alert" hidden><span id="text"></span><button id="again">Try again</button></div>
<div id="panel">
  <label id="detail">Detail
    <input id="ratio" type="range" min="0" max="1" step="0.001" value="1" title="how much of the model is kept"></label>
  <span id="about">loading</span>
  <span id="buttons">
    <button id="auto" aria-pressed="false" title="as much detail as this device draws smoothly (A)">Auto</button>
    <button id="compare" aria-pressed="false" disabled title="a photograph beside the model (C)">Compare</button>
    <button id="reset" title="back to the first view (R)">Reset</button>
    <button id="full" title="full screen (F)">Full screen</button>
  </span>
</div>`;
