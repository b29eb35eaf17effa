// Shows the stages of a model while the rest of the page still arrives: each stage is a script element that calls flexgs.stage().
import * as THREE from "three";
import { OrbitControls } from "three/addons/controls/OrbitControls.js";
import { SparkRenderer, SplatMesh } from "@sparkjsdev/spark";

const renderer = new THREE.WebGLRenderer({ antialias: false });
const scene = new THREE.Scene();
const camera = new THREE.PerspectiveCamera(60, 1, 0.01, 1000);
const controls = new OrbitControls(camera, renderer.domElement);
const stages = [];
let shown = null;
let ready = Promise.resolve();

export function start({ position, target, up, fov, background }) {
  document.body.prepend(renderer.domElement);
  scene.background = new THREE.Color().setRGB(...background, THREE.SRGBColorSpace);
  scene.add(new SparkRenderer({ renderer }));
  camera.up.set(...up);
  camera.position.set(...position);
  camera.fov = fov;
  controls.target.set(...target);
  controls.update();
  const resize = () => {
    renderer.setSize(innerWidth, innerHeight);
    camera.aspect = innerWidth / innerHeight;
    camera.updateProjectionMatrix();
  };
  addEventListener("resize", resize);
  resize();
  let last = performance.now(), frames = 0;
  renderer.setAnimationLoop((now) => {
    renderer.render(scene, camera);
    frames += 1;
    if (now - last > 1000) {
      document.getElementById("fps").textContent = `${((frames * 1000) / (now - last)).toFixed(0)} fps`;
      [last, frames] = [now, 0];
    }
  });
}

export function stage({ label, about }) {
  // The element before the one that is running holds the bytes of an SPZ file.
  const holder = document.currentScript.previousElementSibling;
  const bytes = Uint8Array.from(atob(holder.textContent), (c) => c.charCodeAt(0));
  holder.remove();
  const mesh = new SplatMesh({ fileBytes: bytes, fileType: "spz" });
  ready = ready.then(() => mesh.initialized).then(() => {  // in the order of the page
    const button = document.createElement("button");
    button.textContent = label;
    button.title = about;
    const entry = { mesh, button, about };
    stages.push(entry);
    button.onclick = () => show(entry);
    document.getElementById("stages").append(button);
    show(entry);
  });
}

function show(entry) {
  if (shown) scene.remove(shown.mesh);
  scene.add(entry.mesh);
  shown = entry;
  for (const { button } of stages) button.disabled = button === entry.button;
  document.getElementById("about").textContent = entry.about;
}
